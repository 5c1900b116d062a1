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
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(setting: str) -> int:
    """Pages that the kernel gives for a tensor as large as one that was freed just before."""
    command = [sys.executable, "-c", NEW_PAGES.format(setting=setting)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    assert new_pages("keep_freed_memory()") < 100
    assert new_pages("") > 1000, "the control: every tensor has new pages"
