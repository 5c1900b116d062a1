"""Collators: the inputs they build per user, by hand on small examples."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import light, of_items, without_held_out
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.collators.base import BatchRows, to_device
from trainer.data.collators.retrieval import RetrievalCollator, RetrievalTraining
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.targets import choose_targets, expected_targets
from trainer.data.prompts.packing import pack
from trainer.data.prompts.prompt import READOUT_SLOT
from trainer.data.prompts.row_packing import pack_rows
from trainer.data.prompts.templates import prompt_template
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.histories import Users

EVERYONE = slice(0, 2)


def sequences(**changes: Any) -> SequenceCollator:
    settings = {"num_items": 40, "max_history": 6, "negatives": 2, "fixed_length": False, "seed": 3}
    return SequenceCollator(**{**settings, **changes})


def two_users() -> Users:
    return without_held_out(of_items([5, 6, 7, 8], [9, 10], user_U=[11, 12]))


def test_inputs_and_targets_are_aligned() -> None:
    batch = sequences().train(two_users(), EVERYONE, 0)
    assert batch.user_B.tolist() == [11, 12]
    assert batch.input.item_BL.tolist() == [[5, 6, 7], [0, 0, 9]]
    assert batch.target_BL.tolist() == [[6, 7, 8], [0, 0, 10]]
    assert batch.negative_BLK.shape == (2, 3, 2)
    assert batch.input.rows == BatchRows(0, 2, 2)


@pytest.mark.parametrize(
    ("fixed", "inputs", "targets"),
    [
        (False, [[6, 7], [0, 9]], [[7, 8], [0, 10]]),
        (True, [[6, 7], [0, 9]], [[7, 8], [0, 10]]),
    ],
)
def test_long_histories_keep_their_latest_items(fixed: bool, inputs: list[Any], targets: list[Any]) -> None:
    batch = sequences(max_history=2, fixed_length=fixed).train(two_users(), EVERYONE, 0)
    assert batch.input.item_BL.tolist() == inputs
    assert batch.target_BL.tolist() == targets


def test_fixed_length_is_the_longest_possible() -> None:
    batch = sequences(fixed_length=True).train(two_users(), EVERYONE, 0)
    assert batch.input.item_BL.tolist() == [[0, 0, 0, 5, 6, 7], [0, 0, 0, 0, 0, 9]]
    assert batch.target_BL.tolist() == [[0, 0, 0, 6, 7, 8], [0, 0, 0, 0, 0, 10]]


def test_the_padded_length_does_not_change_negatives() -> None:
    """Longer histories in the batch or a fixed length add padding; the draws of a position stay the same."""
    alone = sequences().train(two_users().take(slice(1, 2)), slice(0, 1), 4)
    short = sequences().train(two_users(), EVERYONE, 4)
    long = sequences(fixed_length=True).train(two_users(), EVERYONE, 4)
    assert alone.negative_BLK.shape == (1, 1, 2)
    assert short.negative_BLK[1, -1:].tolist() == alone.negative_BLK[0].tolist()
    assert long.negative_BLK[:, -3:].tolist() == short.negative_BLK.tolist()


def test_negatives_are_not_the_users_items_and_change_with_the_epoch() -> None:
    users = without_held_out(of_items(range(1, 36), [1, 2]))
    first, second = (sequences(max_history=50).train(users, EVERYONE, epoch).negative_BLK for epoch in (0, 1))
    assert set(first[0].flatten().tolist()) == set(range(36, 41))
    assert not {1, 2} & set(first[1].flatten().tolist())
    assert first.tolist() != second.tolist()
    other_seed = sequences(max_history=50, seed=4).train(users, EVERYONE, 0).negative_BLK
    assert first.tolist() != other_seed.tolist()


item_lists = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=9), min_size=1, max_size=7)


@light
@given(item_lists, st.data())
def test_a_share_is_rows_of_the_whole_batch(lists: list[list[int]], data: st.DataObject) -> None:
    users = without_held_out(of_items(*lists))
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    whole = sequences().train(users, slice(0, len(lists)), 1)
    part = sequences().train(users, slice(start, stop), 1)
    assert part.input.rows == BatchRows(start, stop - start, len(lists))
    for mine, all_of_them in [
        (part.user_B, whole.user_B),
        (part.input.item_BL, whole.input.item_BL),
        (part.target_BL, whole.target_BL),
        (part.negative_BLK, whole.negative_BLK),
    ]:
        assert mine.shape[1:] == all_of_them.shape[1:], "dropout draws masks of the whole batch's shape"
        assert mine.dtype == torch.int64
        assert mine.tolist() == all_of_them[start:stop].tolist()


@light
@given(item_lists)
def test_targets_follow_their_inputs(lists: list[list[int]]) -> None:
    batch = sequences().train(without_held_out(of_items(*lists)), slice(0, len(lists)), 0)
    for user, inputs, targets in zip(lists, batch.input.item_BL.tolist(), batch.target_BL.tolist(), strict=True):
        real = [(item, target) for item, target in zip(inputs, targets, strict=True) if item or target]
        assert real == list(pairwise(user))[-6:]


def test_histories_and_items() -> None:
    some = of_items([5, 6, 7], [8], [])
    assert sequences().histories(some).item_BL.tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert sequences(max_history=2).histories(some).item_BL.tolist() == [[6, 7], [0, 8], [0, 0]]
    assert sequences(max_history=4, fixed_length=True).histories(some).item_BL.shape == (3, 4)
    assert sequences().histories(some).rows == BatchRows(0, 3, 3)
    assert sequences().histories(of_items()).item_BL.shape[0] == 0
    assert sequences().histories(of_items([])).item_BL.tolist() == [[0]]
    assert sequences().items(np.array([3, 1])).item_M.tolist() == [3, 1]


TITLES = [f"T{item}" for item in range(1, 41)]


@pytest.fixture(scope="session")
def tokenizer(tiny_llm: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llm)


@pytest.fixture(scope="session")
def writer(tokenizer: Any) -> PromptWriter:
    words = prompt_template("code", item_slots=True, user_vector=False)
    return PromptWriter(tokenizer, TITLES, words, max_title_tokens=32, max_tokens=512)


def prompts(writer: PromptWriter, **changes: Any) -> RetrievalCollator:
    settings = {
        "writer": writer,
        "teacher": sequences(max_history=5),
        "num_items": 40,
        "shown_history": 3,
        "candidates": 4,
        "exclude_user": True,
        "targets": "last",
        "pack": partial(pack_rows, row_tokens=512),
        "seed": 3,
    }
    return RetrievalCollator(**{**settings, **changes})


def read_back(tokenizer: Any, batch: Any) -> list[tuple[str, list[int]]]:
    """Text (without slots) and slot items of each packed prompt; rows hold whole prompts, one after another."""
    packed = batch.prompts
    token_T, position_T = packed.trained.token_T.tolist(), packed.trained.position_T.tolist()
    item = dict(zip(packed.slot_S.tolist(), packed.slot_item_S.tolist(), strict=True))
    found = []
    for end in packed.readout_R.tolist():
        inside = range(end - position_T[end], end + 1)
        text = tokenizer.decode([token_T[at] for at in inside if at not in item])
        items = [item[at] for at in inside if at in item]
        assert items.pop() == READOUT_SLOT
        found.append((text, items))
    assert sum(len(items) + 1 for _, items in found) == len(item)
    return found


def six_users() -> Users:
    """Histories longer and shorter than the prompt shows (3) and the teacher reads (5)."""
    lists = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2], [9, 9, 1], list(range(1, 37)), [40, 39, 38, 37], [2, 1, 2, 1, 2]]
    return without_held_out(of_items(*lists, user_U=[3, 5, 8, 13, 21, 34]))


def test_a_stream_holds_the_same_prompts_as_rows(writer: PromptWriter) -> None:
    rows = prompts(writer).train(six_users(), slice(0, 6), 0)
    stream = prompts(writer, pack=pack).train(six_users(), slice(0, 6), 0)
    assert stream.prompts.slot_item_S.tolist() == rows.prompts.slot_item_S.tolist()
    assert stream.prompts.useful_tokens == rows.prompts.useful_tokens
    assert stream.prompts.run_tokens < stream.prompts.useful_tokens < rows.prompts.run_tokens
    assert stream.candidate_YC.tolist() == rows.candidate_YC.tolist()


def test_prompts_of_a_training_batch(writer: PromptWriter, tokenizer: Any) -> None:
    batch = prompts(writer).train(six_users(), slice(0, 6), 0)
    assert isinstance(batch, RetrievalTraining)
    assert batch.user_B.tolist() == [3, 5, 8, 13, 21, 34]
    found = read_back(tokenizer, batch)
    users, items = found[:6], found[6:]
    shown = [[5, 6, 7], [1], [9, 9], [33, 34, 35], [40, 39, 38], [1, 2, 1]]
    assert [slots for _, slots in users] == shown
    # Events of days 4 to 6 (1970-01-05 ...), numbered from 1; the target, item 8, is not shown.
    assert users[0][0] == (
        'This user has made a series of purchases in the following order: Item No.1, Time: 1970-01-05, "T5"'
        ',Item No.2, Time: 1970-01-06, "T6",Item No.3, Time: 1970-01-07, "T7"'
        ". Based on this sequence of purchases, generate user representation token:"
    )
    # The teacher reads its own, longer history, again without the target.
    assert batch.sequence is not None
    assert batch.sequence.item_BL.tolist()[:3] == [[3, 4, 5, 6, 7], [0, 0, 0, 0, 1], [0, 0, 0, 9, 9]]
    assert batch.sequence.rows == BatchRows(0, 6, 6)
    for text, slots in items:
        assert text == (
            f'The item title and item embedding are as follows: "T{slots[0]}", then generate item representation token:'
        )
        assert len(slots) == 1


def candidate_items(tokenizer: Any, batch: RetrievalTraining) -> list[list[int]]:
    """Item ids of the candidates, read from the item prompts that they point to."""
    item_P = [slots[0] for _, slots in read_back(tokenizer, batch)[len(batch.user_B) :]]
    assert len(set(item_P)) == len(item_P), "an item that is a candidate of several users is encoded once"
    pointed = set(batch.candidate_YC.flatten().tolist())
    assert pointed == set(range(len(item_P))), "every item prompt is a candidate of some user"
    return [[item_P[place] for place in row] for row in batch.candidate_YC.tolist()]


def test_candidates(writer: PromptWriter, tokenizer: Any) -> None:
    users = six_users()
    targets = [8, 2, 1, 36, 37, 2]
    rows = set()
    for epoch in range(3):
        found = candidate_items(tokenizer, prompts(writer).train(users, slice(0, 6), epoch))
        assert [row[0] for row in found] == targets
        for user, row in enumerate(found):
            own = set(users.train.take(slice(user, user + 1)).item_E.tolist())
            assert len(set(row)) == len(row) == 4
            assert not own & set(row[1:])
        rows.add(str(found))
    assert len(rows) == 3, "each epoch draws new negatives"


def test_official_negatives_exclude_the_history_before_the_target(writer: PromptWriter, tokenizer: Any) -> None:
    """All of it, not only the three items in the prompt, but not the target."""
    collator = prompts(writer, exclude_user=False, num_items=13, candidates=4)
    users = without_held_out(of_items([1, 2, 3, 4, 5, 6, 7, 8], [4, 4, 4]))
    target_again, free = 0, set()
    for epoch in range(40):
        first, second = candidate_items(tokenizer, collator.train(users, EVERYONE, epoch))
        assert first[0] == 8
        assert not set(range(1, 8)) & set(first[1:])
        assert len(set(first[1:])) == 3
        target_again += 8 in first[1:]
        free |= set(first[1:])
        assert second[0] == 4
        assert 4 not in second[1:]
    assert 5 < target_again < 35  # expected: 3 of 6 allowed items are drawn, so about every second epoch
    assert free == set(range(8, 14))


def test_official_negatives_exclude_128_items_at_most(writer: PromptWriter, tokenizer: Any) -> None:
    """As many as the official code's SASRec reads: what is older can be drawn."""
    collator = prompts(writer, exclude_user=False, num_items=40, candidates=4)
    users = without_held_out(of_items([39, 40, *[*range(1, 33)] * 4, 38]))
    drawn = set()
    for epoch in range(40):
        [row] = candidate_items(tokenizer, collator.train(users, slice(0, 1), epoch))
        drawn |= set(row[1:])
    assert drawn == set(range(33, 41))


def test_shares_join_to_the_whole_batch(writer: PromptWriter, tokenizer: Any) -> None:
    collator, users = prompts(writer), six_users()
    whole = collator.train(users, slice(0, 6), 2)
    parts = [collator.train(users, slice(a, b), 2) for a, b in ((0, 1), (1, 3), (3, 3), (3, 6))]
    assert [row for part in parts for row in candidate_items(tokenizer, part)] == candidate_items(tokenizer, whole)
    assert [user for part in parts for user in part.user_B.tolist()] == whole.user_B.tolist()
    said = [text for part in parts for text in read_back(tokenizer, part)[: len(part.user_B)]]
    assert said == read_back(tokenizer, whole)[:6]
    # Dropout of the teacher draws masks in the whole batch's shape, so shares must not be padded to their own length.
    sequences_of_parts = [part.sequence for part in parts if part.sequence is not None]
    assert whole.sequence is not None
    joined_BL = torch.cat([sequence.item_BL for sequence in sequences_of_parts])
    assert joined_BL.tolist() == whole.sequence.item_BL.tolist()
    assert [sequence.rows for sequence in sequences_of_parts] == [
        BatchRows(0, 1, 6),
        BatchRows(1, 2, 6),
        BatchRows(3, 0, 6),
        BatchRows(3, 3, 6),
    ]


SHARES = ((0, 1), (1, 3), (3, 3), (3, 6))


def of_batch(writer: PromptWriter, **changes: Any) -> RetrievalCollator:
    """A collator that scores against all items of the batch."""
    return prompts(writer, target_share_N=np.full(41, 1 / 40), candidates=3, targets="window", **changes)


def test_every_item_of_the_batch_is_encoded_once_by_some_share(writer: PromptWriter, tokenizer: Any) -> None:
    users = six_users()
    whole = of_batch(writer).train(users, slice(0, 6), 0)
    assert whole.batch_items is not None
    everything = [slots[0] for _, slots in read_back(tokenizer, whole)[len(whole.candidate_YC) :]]
    assert everything == sorted(set(everything))
    targets = choose_targets(users.train, "window", max_history=3, address=(3, 0))
    assert [everything[place] for place in whole.candidate_YC[:, 0]] == targets.items(users.train).tolist()
    assert len(everything) > len(set(targets.items(users.train).tolist())), "negatives are among them"
    parts = [of_batch(writer).train(users, slice(a, b), 0) for a, b in SHARES]
    encoded = [slots[0] for part in parts for _, slots in read_back(tokenizer, part)[len(part.candidate_YC) :]]
    assert encoded == everything
    for name in ("log_q_BX", "excluded_BM"):
        joined = torch.cat([getattr(part.batch_items, name) for part in parts])
        assert torch.equal(joined, getattr(whole.batch_items, name)), name
    for user, row_M in enumerate(whole.batch_items.excluded_BM.tolist()):
        own = set(users.train.take(slice(user, user + 1)).item_E.tolist())
        assert {item for item, mark in zip(everything, row_M, strict=True) if mark} == own & set(everything)


def test_log_q_is_the_chance_to_get_into_a_batch(writer: PromptWriter) -> None:
    """Against how often items get into the batches of many epochs; items that the users own are drawn less often."""
    users, epochs = without_held_out(of_items(*([[1, 2], [3, 2]] * 4))), 600
    share_N = expected_targets(users.train, "window", max_history=3, num_items=40)
    collator = replace(of_batch(writer), target_share_N=share_N / share_N.sum(), pack=lambda _: pack([]))
    count_N = np.zeros(41)
    log_q: dict[int, float] = {}
    for epoch in range(epochs):
        every = choose_targets(users.train, "window", max_history=3, address=(3, epoch))
        item_M = collator._items_of_batch(users.train, every, epoch)
        count_N[item_M] += 1 / epochs
        found = collator.train(users, slice(0, 8), epoch).batch_items
        assert found is not None
        log_q |= dict(zip(item_M.tolist(), found.log_q_BX.flatten().tolist(), strict=False))
    for item in range(4, 41):
        assert np.exp(log_q[item]) == pytest.approx(count_N[item], abs=0.08)
    assert np.exp(log_q[2]) == pytest.approx(1.0, abs=0.01)


def test_histories_with_older_items_as_vectors(writer: PromptWriter, tokenizer: Any) -> None:
    collator = prompts(writer, shown_history=7, max_vector_items=4)
    some = of_items(list(range(1, 10)), [7, 8], [1, 2, 3, 4])
    (long, slots), (short, few), (middle, some_slots) = read_back(tokenizer, collator.histories(some))
    assert (slots, few, some_slots) == ([3, 4, 5, 6, 7, 8, 9], [7, 8], [1, 2, 3, 4])
    assert [text.count("Item No.") for text in (long, short, middle)] == [3, 2, 3]
    assert [text.count("the earlier items") for text in (long, short, middle)] == [1, 0, 1]
    shuffled = collator.histories(some.last(collator.max_history).shuffled(0))
    assert [sorted(found) for _, found in read_back(tokenizer, shuffled)] == [slots, few, some_slots]


def test_a_rank_without_users_still_has_a_row(writer: PromptWriter) -> None:
    empty = prompts(writer).train(six_users(), slice(2, 2), 0)
    assert empty.prompts.trained.token_T.shape == (512,)
    assert empty.prompts.useful_tokens == 0
    assert empty.user_B.shape == (0,)
    assert empty.candidate_YC.shape == (0, 4)
    assert empty.sequence is not None
    assert empty.sequence.item_BL.shape == (0, 5)
    none = sequences().train(six_users(), slice(6, 6), 0)
    assert none.input.item_BL.shape == none.target_BL.shape == (0, 6)
    assert none.negative_BLK.shape == (0, 6, 2)
    assert none.input.rows == BatchRows(6, 0, 6)


def test_histories_of_prompts_are_shown_whole(writer: PromptWriter, tokenizer: Any) -> None:
    """For ranking, no item is held out: the latest items are shown."""
    batch = prompts(writer).histories(of_items([1, 2, 3, 4, 5, 6], [7]))
    assert [slots for _, slots in read_back(tokenizer, batch)] == [[4, 5, 6], [7]]
    assert batch.sequence is not None
    assert batch.sequence.item_BL.tolist() == [[2, 3, 4, 5, 6], [0, 0, 0, 0, 7]]
    items = prompts(writer).items(np.array([9, 2, 9]))
    assert [slots for _, slots in read_back(tokenizer, items)] == [[9], [2], [9]]
    assert prompts(writer).histories(of_items()).prompts.trained.token_T.shape == (512,)
    assert prompts(writer).items(np.zeros(0, np.int64)).prompts.trained.token_T.shape == (512,)


def test_collators_travel_to_other_processes(writer: PromptWriter) -> None:
    for collator in (sequences(), prompts(writer)):
        there = pickle.loads(pickle.dumps(collator))
        here, away = (some.train(six_users(), slice(0, 6), 1) for some in (collator, there))
        assert str(here) == str(away)


def test_to_device_moves_every_tensor_that_a_model_reads(writer: PromptWriter) -> None:
    batch = prompts(writer).train(six_users(), slice(0, 6), 0)
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, RetrievalTraining)
    assert moved.prompts.useful_tokens == batch.prompts.useful_tokens
    assert moved.sequence is not None
    assert batch.sequence is not None
    assert moved.sequence.rows == batch.sequence.rows
    stay = [moved.user_B, moved.prompts.slot_prompt_S, moved.prompts.readout_prompt_R]
    assert {tensor.device.type for tensor in stay} == {"cpu"}
    tensors = [moved.candidate_YC, moved.sequence.item_BL]
    trained = moved.prompts.trained
    streams = [moved.prompts, trained, *trained.groups, *([trained.segments] if trained.segments else [])]
    found = [value for part in streams for value in vars(part).values() if isinstance(value, torch.Tensor)]
    tensors += [value for value in found if not any(value is kept for kept in stay)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == 2 + 7 + 3 + 4
