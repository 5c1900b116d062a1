"""The process that a rank runs in."""

from __future__ import annotations

import platform
import resource
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


HEAP = """
import torch
from trainer.device import HeapTrimmer, _resident_pages, keep_freed_memory
keep_freed_memory()
trimmer = HeapTrimmer()
trimmer.after_step()
held = [torch.ones(16 << 20) for _ in range(12)]  # 64 MiB each
del held
kept = _resident_pages()
trimmer.after_step()
print(kept, _resident_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is specific to glibc")
def test_a_heap_that_has_grown_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    pages = 12 * (64 << 20) // resource.getpagesize()
    assert kept > pages, "control: freed memory stays"
    assert left < kept - 0.9 * pages
