"""See `slurm_fixtures.py`: of several `conftest.py` mypy can check one alone."""

from __future__ import annotations

from slurm_fixtures import cluster

__all__ = ["cluster"]
