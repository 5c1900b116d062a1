"""The prefetching thread: same steps, errors in their turn, and it always ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.loader import StepBatches, StepLoader
from trainer.data.prefetch import Prefetched
from trainer.data.prompts.packing import pack
from trainer.data.prompts.templates import prompt_template
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order

ROOT = Path(__file__).parents[2]
BATCH = 20  # of 61 users: four steps per epoch


@pytest.fixture(scope="module")
def dataset(world: Path) -> Dataset:
    return open_dataset(world, full_check=False)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def loader(dataset: Dataset, collator: Any, **changes: Any) -> StepLoader[Any]:
    settings: dict[str, Any] = {"batch_size": BATCH, "micro_batches": 2, "shuffle_shards": 2, "seed": 5, "workers": 0}
    return StepLoader(dataset, collator, **{**settings, "rank": 0, "world_size": 1, **changes})


def prompts(dataset: Dataset, tiny_llm: Path) -> RetrievalCollator:
    from transformers import AutoTokenizer

    words = prompt_template("code", item_slots=True, user_vector=False)
    writer = PromptWriter(
        AutoTokenizer.from_pretrained(tiny_llm), dataset.titles, words, max_title_tokens=24, max_tokens=400
    )
    return RetrievalCollator(
        writer=writer, teacher=sequences(dataset), num_items=dataset.num_items, shown_history=3, candidates=4,
        exclude_user=True, targets="last", pack=pack, seed=5,
    )  # fmt: skip


def sequences(dataset: Dataset) -> SequenceCollator:
    return SequenceCollator(dataset.num_items, max_history=12, negatives=2, fixed_length=False, seed=5)


def one_by_one(some: StepLoader[Any], first: int, total: int) -> list[StepBatches[Any]]:
    """The steps built without a thread: epoch by epoch."""
    return [step for epoch in range(-(-total // 4)) for step in some.epoch(epoch)][first:total]


class Counting:
    """A collator that counts its calls and can fail; one call per step."""

    max_history = 1

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls = 0
        self.fail_at = fail_at

    def train(self, users: Users, share: slice, epoch: int) -> int:
        if self.calls == self.fail_at:
            raise ValueError(f"step {self.calls} cannot be built: do something else")
        self.calls += 1
        return self.calls


# ---------------------------------------------------------------------------------------------- the same steps


@pytest.mark.parametrize(("first", "total"), [(0, 10), (3, 10), (4, 8), (6, 7), (5, 5)])
@pytest.mark.parametrize("kind", ["sequences", "prompts"])
def test_the_steps_are_those_without_a_thread(
    dataset: Dataset, tiny_llm: Path, kind: str, first: int, total: int
) -> None:
    """Over several epochs, and from a step in the middle of an epoch, as a resumed run takes them."""
    some = loader(dataset, prompts(dataset, tiny_llm) if kind == "prompts" else sequences(dataset))
    found, expected = list(some.steps(first, total)), one_by_one(some, first, total)
    assert len(found) == total - first
    assert [str(step) for step in found] == [str(step) for step in expected]
    for mine, its in zip(found, expected, strict=True):
        for here, there in zip(mine.micro_batches, its.micro_batches, strict=True):
            assert torch.equal(here.user_B, there.user_B)
            if kind == "prompts":
                assert torch.equal(here.prompts.trained.token_T, there.prompts.trained.token_T)
                assert torch.equal(here.candidate_YC, there.candidate_YC)
            else:
                assert torch.equal(here.negative_BLK, there.negative_BLK)


def test_the_thread_draws_no_random_numbers(dataset: Dataset, tiny_llm: Path) -> None:
    """The engine seeds torch before each forward pass, and the thread works during that pass."""
    torch.manual_seed(7)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    list(loader(dataset, prompts(dataset, tiny_llm)).steps(0, 9))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]


def test_the_next_step_is_built_during_a_step_but_not_many_more(dataset: Dataset) -> None:
    collator = Counting()
    with_thread = loader(dataset, collator, micro_batches=1).steps(0, 100)
    next(with_thread)
    for _ in range(1000):
        if collator.calls == 3:
            break
        time.sleep(0.01)
    time.sleep(0.1)
    assert collator.calls == 3, "the one in use, and two ahead"
    with_thread.close()


def test_evaluation_may_write_prompts_at_the_same_time(dataset: Dataset, tiny_llm: Path) -> None:
    """Dates and numbers are tokenised when they first occur, in the thread or in a validation that runs beside it."""
    users = next(read_in_order(dataset.path, dataset.manifest))
    alone = prompts(dataset, tiny_llm).histories(users.train).prompts.trained.token_T
    expected = [str(step) for step in one_by_one(loader(dataset, prompts(dataset, tiny_llm)), 0, 8)]
    for _ in range(3):
        fresh = prompts(dataset, tiny_llm)
        with ThreadPoolExecutor(2) as pool:
            steps = pool.submit(lambda c: [str(s) for s in loader(dataset, c).steps(0, 8)], fresh)
            read = pool.submit(lambda c: c.histories(users.train).prompts.trained.token_T, fresh)
            assert torch.equal(read.result(), alone)
            assert steps.result() == expected


def test_pinned_batches_are_pinned_at_any_depth(
    dataset: Dataset, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page-locked memory needs CUDA: here a stand-in notes the tensors and copies them."""
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread().name == "prefetch"
        pinned.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    some = loader(dataset, prompts(dataset, tiny_llm), pinned=True)
    [step] = some.steps(0, 1)
    [plain] = loader(dataset, some.collator).steps(0, 1)
    assert str(step) == str(plain)
    assert len(pinned) > 20


# ---------------------------------------------------------------------------------------------- errors


def test_an_error_is_raised_when_its_step_is_asked_for(dataset: Dataset) -> None:
    steps = loader(dataset, Counting(fail_at=2), micro_batches=1).steps(0, 9)
    assert [next(steps).micro_batches for _ in range(2)] == [(1,), (2,)]
    with pytest.raises(ValueError, match="step 2 cannot be built: do something else") as raised:
        next(steps)
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[-1] == "train", "the traceback leads to the line in the collator"
    assert not threads()
    assert list(steps) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, StopIteration])
def test_any_kind_of_error_arrives(kind: type[BaseException]) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise kind

    feed = Prefetched(source(), 2)
    assert next(feed) == 1
    # A StopIteration inside a generator is a bug, which Python turns into a RuntimeError.
    with pytest.raises(RuntimeError if kind is StopIteration else kind):
        next(feed)
    with pytest.raises(StopIteration):
        next(feed)


# ---------------------------------------------------------------------------------------------- its end


def test_closing_early_ends_the_thread(dataset: Dataset) -> None:
    steps = loader(dataset, sequences(dataset)).steps(0, 100)
    next(steps)
    assert len(threads()) == 1
    steps.close()
    assert not threads()


def test_a_thread_that_waits_for_room_ends_at_once() -> None:
    for taken in range(4):
        feed = Prefetched(count(), 1)
        assert list(islice(feed, taken)) == list(range(taken))
        start = time.monotonic()
        feed.close()
        assert time.monotonic() - start < 5
        assert not threads()
        assert list(feed) == [], "nothing follows"
        feed.close()


def test_an_iterator_that_is_dropped_ends_its_thread() -> None:
    def drop_it() -> None:
        feed = Prefetched(count(), 1)
        next(feed)
        cycle: list[Any] = [feed]
        cycle.append(cycle)

    drop_it()
    gc.collect()
    assert not threads()


@pytest.mark.process
@pytest.mark.parametrize("ending", ["", "raise ValueError('over')", "sys.exit(3)"])
def test_the_interpreter_exits_beside_an_open_iterator(ending: str) -> None:
    """Neither waiting forever for a thread that waits for room, nor with a thread that works on while modules go."""
    script = f"""
import sys
from itertools import count
from trainer.data.prefetch import Prefetched
def steps():
    yield from Prefetched(map(lambda n: min(range(20000, 0, -1)) + n, count()), 2)
kept = steps()
print(next(kept), next(kept))
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.stdout == "1 2\n", done.stderr
    assert done.returncode == {"": 0, "raise ValueError('over')": 1, "sys.exit(3)": 3}[ending]
    assert done.stderr.count("Traceback") == (done.returncode == 1)
