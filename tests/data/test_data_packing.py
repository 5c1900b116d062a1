"""Packing: every prompt is found where the batch says it is."""

from __future__ import annotations

import numpy as np
from data_helpers import light
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import PackedPrompts, pack
from trainer.data.prompts import Prompt

ROW = 24


@st.composite
def prompts(draw: st.DrawFn) -> list[Prompt]:
    """Prompts with token ids that occur once each."""
    made = []
    token = 1
    for length in draw(st.lists(st.integers(1, ROW), max_size=14)):
        slots = sorted(draw(st.sets(st.integers(0, length - 2), max_size=4))) if length > 1 else []
        items = draw(st.lists(st.integers(1, 99), min_size=len(slots), max_size=len(slots)))
        arrays = (np.array(values, np.int64) for values in (range(token, token + length), slots, items))
        made.append(Prompt(*arrays))
        token += length
    return made


def stretch(packed: PackedPrompts, prompt: int, length: int) -> tuple[int, slice]:
    """Row and columns of a prompt, from its read-out."""
    end = int(packed.readout_column_P[prompt])
    assert end + 1 - length >= 0
    return int(packed.readout_row_P[prompt]), slice(end + 1 - length, end + 1)


@light
@given(prompts())
def test_prompts_are_where_the_readout_says(some: list[Prompt]) -> None:
    packed = pack(some, ROW)
    taken = np.zeros(packed.token_RT.shape, int)
    for number, prompt in enumerate(some):
        place = stretch(packed, number, len(prompt.token_T))
        assert packed.token_RT[place].tolist() == prompt.token_T.tolist()
        assert packed.position_RT[place].tolist() == list(range(len(prompt.token_T)))
        taken[place] += 1
    assert taken.max() <= 1, "prompts overlap"
    assert len(packed.readout_row_P) == len(packed.readout_column_P) == len(some)
    assert packed.useful_tokens == taken.sum() == sum(len(prompt.token_T) for prompt in some)
    assert (packed.token_RT.numpy()[taken == 0] == 0).all()


@light
@given(prompts())
def test_slots_are_those_of_the_prompts_in_order(some: list[Prompt]) -> None:
    packed = pack(some, ROW)
    slots = zip(packed.slot_row_S.tolist(), packed.slot_column_S.tolist(), packed.slot_item_S.tolist(), strict=True)
    found = [(int(packed.token_RT[row, column]), item) for row, column, item in slots]
    asked = [
        (int(prompt.token_T[slot]), int(item))
        for prompt in some
        for slot, item in zip(prompt.slot_S, prompt.item_S, strict=True)
    ]
    assert found == asked


@light
@given(prompts())
def test_padding_is_a_stretch_of_its_own(some: list[Prompt]) -> None:
    """Positions restart where the padding starts, so it does not count as part of the last prompt."""
    packed = pack(some, ROW)
    used = np.zeros(len(packed.token_RT), int)
    for number in range(len(some)):
        used[packed.readout_row_P[number]] = max(
            used[packed.readout_row_P[number]], packed.readout_column_P[number] + 1
        )
    for row, start in enumerate(used):
        assert packed.position_RT[row, start:].tolist() == list(range(ROW - start))


@light
@given(prompts())
def test_little_padding(some: list[Prompt]) -> None:
    """First fit leaves at most one row half empty; decreasing lengths keep it near the best possible."""
    packed = pack(some, ROW)
    useful = sum(len(prompt.token_T) for prompt in some)
    least = -(-useful // ROW)
    assert least <= len(packed.token_RT) <= max(1, 2 * least)
    row_P = packed.readout_row_P.tolist()
    filled = sorted(
        sum(len(prompt.token_T) for prompt, at in zip(some, row_P, strict=True) if at == row) for row in set(row_P)
    )
    assert all(tokens * 2 > ROW for tokens in filled[1:])


def test_longest_prompts_first() -> None:
    """In the order given, first fit would put 6, 6 and 4 together and need a fourth row."""
    lengths = [6, 6, 4, 18, 18, 20]
    packed = pack([Prompt(np.ones(n, np.int64), *np.zeros((2, 0), np.int64)) for n in lengths], ROW)
    assert packed.token_RT.shape == (3, ROW)
    assert packed.useful_tokens == 72


def test_no_prompts_are_one_row_of_padding() -> None:
    packed = pack([], ROW)
    assert packed.token_RT.tolist() == [[0] * ROW]
    assert packed.position_RT.tolist() == [list(range(ROW))]
    assert packed.useful_tokens == 0
    for part in (packed.slot_row_S, packed.slot_column_S, packed.slot_item_S, packed.readout_row_P):
        assert part.shape == (0,)
        assert not part.dtype.is_floating_point
