"""Fixtures are in `launch_fixtures.py`: mypy can check only one of several `conftest.py`."""

from __future__ import annotations

from launch_fixtures import deepspeed_imported, environment, preset, refused, srec

__all__ = ["deepspeed_imported", "environment", "preset", "refused", "srec"]
