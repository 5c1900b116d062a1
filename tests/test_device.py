"""The process that a rank runs in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

NEW_PAGES = """
import resource, torch
from trainer.device import keep_freed_memory
{setting}
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for rounds in (5, 20):
    before = pages()
    for _ in range(rounds):
        torch.ones(16 << 20)  # 64 MiB, freed at once
print((pages() - before) / rounds)
"""


def new_pages(setting: str) -> float:
    """Mean minor page faults per allocation of a tensor as large as one just freed."""
    command = [sys.executable, "-c", NEW_PAGES.format(setting=setting)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc options are specific to glibc")
def test_freed_memory_is_reused() -> None:
    of_fresh_tensor = new_pages("")
    assert new_pages("keep_freed_memory()") < of_fresh_tensor / 4
    assert of_fresh_tensor > 1000, "control: without the setting, every tensor faults in new pages"
