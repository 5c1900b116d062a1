"""Imports of a command, which delay every start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

_COMMAND = "import trainer.workflows.setup, trainer.engine.loop, trainer.workflows.evaluate_run"
_SLOW = {"transformers", "peft"}


@pytest.mark.parametrize(
    ("builder", "allowed"),
    [("by_id.build", set()), ("llm.build", {"transformers"})],
    ids=["by number", "around an LLM"],
)
def test_a_system_imports_only_what_it_needs(builder: str, allowed: set[str]) -> None:
    code = f"import json, sys; {_COMMAND}, trainer.models.{builder}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert _SLOW & set(json.loads(done.stdout.splitlines()[-1])) == allowed
