"""The loader of a rank: its share of each global batch, in micro-batches, from any number of loader processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.data.collators.base import TrainingCollator
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.loader import StepBatches, StepLoader
from trainer.data.prompts.packing import pack
from trainer.data.prompts.templates import prompt_template
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.runs.batch_shares import num_steps

BATCH = 20  # of 61 users: the fourth and last batch holds one user


@pytest.fixture(scope="session")
def collators(world: Path, tiny_llm: Path) -> dict[str, TrainingCollator[Any]]:
    from transformers import AutoTokenizer

    dataset = open_dataset(world, full_check=False)
    sequences = SequenceCollator(num_items=40, max_history=12, negatives=2, fixed_length=False, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    words = prompt_template("code", item_slots=True, user_vector=False)
    writer = PromptWriter(tokenizer, dataset.titles, words, max_title_tokens=24, max_tokens=400)
    prompts = RetrievalCollator(
        writer=writer,
        teacher=sequences,
        num_items=40,
        shown_history=3,
        candidates=4,
        exclude_user=True,
        targets="last",
        pack=pack,
        seed=5,
    )
    return {"sequences": sequences, "prompts": prompts}


def loader(world: Path, collator: TrainingCollator[Any], **changes: Any) -> StepLoader[Any]:
    settings: dict[str, Any] = {
        "dataset": open_dataset(world, full_check=False),
        "collator": collator,
        "batch_size": BATCH,
        "micro_batches": 1,
        "shuffle_shards": 2,
        "seed": 5,
        "workers": 0,
        "rank": 0,
        "world_size": 1,
    }
    return StepLoader(**{**settings, **changes})


def user_rows(batch: Any) -> list[Tensor]:
    """The rows of each user in a batch, independent of the other users packed with it."""
    sequence = batch.input if hasattr(batch, "input") else batch.sequence
    rest = [batch.target_BL, batch.negative_BLK] if hasattr(batch, "input") else []
    return [batch.user_B, sequence.item_BL, *rest]


def joined(steps: list[StepBatches[Any]]) -> list[Tensor]:
    """The users' rows of one step, from the micro-batches of all ranks in order."""
    parts = [user_rows(batch) for step in steps for batch in step.micro_batches]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("kind", ["sequences", "prompts"])
@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 7)])
def test_ranks_and_micro_batches_join_to_the_global_batch(
    world: Path, collators: dict[str, Any], kind: str, world_size: int, micro_batches: int
) -> None:
    """With four ranks, the last batch has one user, so three ranks get empty shares."""
    alone = list(loader(world, collators[kind]).epoch(2))
    ranks = [
        list(loader(world, collators[kind], rank=rank, world_size=world_size, micro_batches=micro_batches).epoch(2))
        for rank in range(world_size)
    ]
    assert {len(steps) for steps in ranks} == {len(alone)} == {num_steps(61, BATCH)} == {4}
    for number, step in enumerate(alone):
        shares = [steps[number] for steps in ranks]
        assert all(len(each.micro_batches) == micro_batches for each in shares)
        assert all(each.user_U.tolist() == step.user_U.tolist() for each in shares)
        expected = joined([step])
        assert expected[0].tolist() == step.user_U.tolist()
        assert [column.tolist() for column in joined(shares)] == [column.tolist() for column in expected]
        sizes = [sum(len(batch.user_B) for batch in each.micro_batches) for each in shares]
        assert [each.own_users for each in shares] == sizes
        assert max(sizes) - min(sizes) <= 1
    users = [user for step in alone for user in step.user_U.tolist()]
    assert sorted(users) == list(range(61))


def test_resuming_and_epochs(world: Path, collators: dict[str, Any]) -> None:
    some = loader(world, collators["sequences"])
    whole = [str(step) for step in some.epoch(1)]
    assert [str(step) for step in some.epoch(1, first_step=3)] == whole[3:]
    assert [str(step) for step in some.epoch(1, first_step=4)] == []
    assert [str(step) for step in some.epoch(0)] != whole


@pytest.mark.parametrize("kind", ["sequences", "prompts"])
def test_a_training_order_is_the_same_in_every_epoch_and_on_any_rank(
    world: Path, collators: dict[str, Any], kind: str
) -> None:
    """Inputs differ from those in the original order; another epoch, two ranks and a resumed epoch read the same."""

    def rows(some: StepLoader[Any], epoch: int, first_step: int = 0) -> dict[int, list[int]]:
        """What each user's history is, by user."""
        found: dict[int, list[int]] = {}
        for step in some.epoch(epoch, first_step):
            for batch in step.micro_batches:
                user_B, item_BL = user_rows(batch)[:2]
                found |= {
                    user: [item for item in row if item]
                    for user, row in zip(user_B.tolist(), item_BL.tolist(), strict=True)
                }
        return found

    original = rows(loader(world, collators[kind]), 0)
    shuffled = rows(loader(world, collators[kind], training_order="history"), 0)
    assert shuffled != original
    assert {user: sorted(row) for user, row in shuffled.items()} == {
        user: sorted(row) for user, row in original.items()
    }
    assert rows(loader(world, collators[kind], training_order="history"), 3) == shuffled
    parts = [rows(loader(world, collators[kind], training_order="history", rank=r, world_size=2), 3) for r in range(2)]
    assert parts[0] | parts[1] == shuffled
    rest = rows(loader(world, collators[kind], training_order="history"), 3, first_step=2)
    assert rest
    assert all(shuffled[user] == row for user, row in rest.items())


class Noting:
    """A collator that returns its arguments."""

    max_history = 1

    def train(self, users: Users, share: slice, epoch: int) -> tuple[int, int, int, int]:
        return len(users), share.start, share.stop, epoch


@pytest.mark.parametrize("epoch", [0, 7])
def test_arguments_of_the_collator(world: Path, epoch: int) -> None:
    """The collator receives the global batch, the rows of a micro-batch in it, and the epoch for the negatives."""
    some = loader(world, Noting(), rank=1, world_size=2, micro_batches=2)
    asked = [step.micro_batches for step in some.epoch(epoch)]
    assert asked[0] == ((20, 10, 15, epoch), (20, 15, 20, epoch))
    assert asked[3] == ((1, 0, 0, epoch), (1, 0, 1, epoch))


@pytest.mark.process
def test_loader_processes_change_nothing(world: Path, collators: dict[str, Any]) -> None:
    """Two processes and three steps, so that one of them has more work; spawned, so everything is pickled."""
    one, two = (loader(world, collators["prompts"], workers=workers, rank=1, world_size=2) for workers in (0, 2))
    expected, found = list(one.epoch(3, first_step=1)), list(two.epoch(3, first_step=1))
    assert len(expected) == 3
    assert [str(step) for step in found] == [str(step) for step in expected]
    for here, there in zip(expected, found, strict=True):
        mine, its = here.micro_batches[0], there.micro_batches[0]
        assert torch.equal(mine.prompts.trained.token_T, its.prompts.trained.token_T)
        assert torch.equal(mine.candidate_YC, its.candidate_YC)
