"""Runs as Slurm jobs: see docs/clusters.md."""
