"""Fixtures are in `slurm_fixtures.py`: mypy can check only one of several `conftest.py`."""

from __future__ import annotations

from slurm_fixtures import cluster

__all__ = ["cluster"]
