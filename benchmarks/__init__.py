"""Measurements: scripts that run as `python -m benchmarks.NAME`; `benchmarks/README.md` lists them."""
