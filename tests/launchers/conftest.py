"""See `launch_fixtures.py`: of several `conftest.py` mypy can check one alone."""

from __future__ import annotations

from launch_fixtures import deepspeed_imported, preset, refused, srec

__all__ = ["deepspeed_imported", "preset", "refused", "srec"]
