"""A distributed trainer for LLM-based sequential recommenders; the Python API is `trainer.api`, re-exported here.

Names are imported when they are first used: `import trainer` alone imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.api import History, ItemVectors, Run, load_config, load_run, train
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'trainer' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module("trainer.api"), name)


__all__ = ["History", "ItemVectors", "Run", "load_config", "load_run", "train"]
