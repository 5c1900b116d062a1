"""Fixtures are in `fake_fixtures.py`: mypy can check only one of several `conftest.py`."""

from __future__ import annotations

from fake_fixtures import fake_cuda

__all__ = ["fake_cuda"]
