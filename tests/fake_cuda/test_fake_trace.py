"""The trace reports each fault of a program that has one, and nothing of a program that has none."""

from __future__ import annotations

import pytest
from fake_fixtures import FakeCuda

HERE = "tests/fake_cuda"
SIZE = 512
"""Bytes of a tensor of (4, 8) in fp32, rounded up."""


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("item", "item"),
        ("tolist", "copy to host"),
        ("branch", "item"),
        ("nonzero", "nonzero"),
        ("boolean index", "boolean index"),
        ("boolean rows", "boolean index"),
        ("masked assignment", "boolean index"),
        ("equal", "equal"),
        ("copy to host", "copy to host"),
        ("late copy to host", "copy to host"),
        ("scalar to device", "blocking copy to device"),
        ("pageable copy", "blocking copy to device"),
        ("synchronize", "synchronize"),
    ],
)
def test_a_wait_of_the_host_is_seen(fake_cuda: FakeCuda, fault: str, kind: str) -> None:
    found = fake_cuda.ask({"fault": fault})
    assert [(wait.rpartition(": ")[2], times) for wait, times in found["waits"].items()] == [(kind, 1)]


@pytest.mark.parametrize("fault", ["asynchronous copy", "host scalar", "views", "fused norm", "held"])
def test_what_does_not_wait_is_not_reported(fake_cuda: FakeCuda, fault: str) -> None:
    assert fake_cuda.ask({"fault": fault})["waits"] == {}


def test_an_operand_on_the_host_is_an_error_or_reported(fake_cuda: FakeCuda) -> None:
    with pytest.raises(AssertionError, match="two devices, cuda:0 and cpu"):
        fake_cuda.ask({"fault": "host operand"})
    assert list(fake_cuda.ask({"fault": "host index"})["mixed"].values()) == [1]
    assert fake_cuda.ask({"fault": "host scalar"})["mixed"] == {}


def test_kernels_and_copies_are_counted(fake_cuda: FakeCuda) -> None:
    assert fake_cuda.ask({"fault": "views"})["kernels"] == {}
    assert fake_cuda.ask({"fault": "held"})["kernels"] == {"aten::mul.Tensor": 1, "aten::add.Tensor": 1, "aten::sum": 1}
    assert fake_cuda.ask({"fault": "fused norm"})["kernels"]["fake_cuda::rms_norm"] == 1
    assert fake_cuda.ask({"fault": "asynchronous copy"})["copied"] == 4 * 8 * 4


def test_memory_is_that_of_the_tensors_alive_at_once(fake_cuda: FakeCuda) -> None:
    held, freed = (fake_cuda.ask({"fault": fault}) for fault in ("held", "freed"))
    assert (held["peak"], held["live"]) == (4 * SIZE, SIZE)  # given, doubled, sum, total
    assert (freed["peak"], freed["live"]) == (3 * SIZE, SIZE)
