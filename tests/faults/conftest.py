"""Fixtures are in `fault_fixtures.py`: mypy can check only one of several `conftest.py`."""

from __future__ import annotations

from fault_fixtures import preset, undisturbed

__all__ = ["preset", "undisturbed"]
