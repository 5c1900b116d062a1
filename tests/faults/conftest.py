"""See `fault_fixtures.py`: of several `conftest.py` mypy can check one alone."""

from __future__ import annotations

from fault_fixtures import preset, undisturbed

__all__ = ["preset", "undisturbed"]
