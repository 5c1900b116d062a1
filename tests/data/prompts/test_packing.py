"""Packing: every token sees exactly what precedes it in its own prompt."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from data_helpers import light
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.prompts.packing import PackedPrompts, Stream, pack
from trainer.data.prompts.prefix_cache_index import PrefixCacheIndex
from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Branch, Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.data.reading.counter_rng import IntArray

ROW = 40
NOTHING = np.zeros(0, np.int64)
Token = tuple[int, int]


def array(values: list[int]) -> IntArray:
    return np.array(values, np.int64)


@st.composite
def prompts(draw: st.DrawFn) -> list[Prompt]:
    """Prompts over few distinct tokens, so that many share a prefix."""
    texts = st.lists(st.integers(1, 2), min_size=1, max_size=24)

    def indices(length: int) -> list[int]:
        return sorted(draw(st.sets(st.integers(0, length - 1), max_size=4)))

    made = []
    for text in draw(st.lists(texts, max_size=8)):
        slots = indices(len(text))
        branches = []
        for _ in range(draw(st.integers(0, 2))):
            after, own = draw(st.integers(0, len(text))), draw(texts.filter(lambda text: len(text) < 12))
            slot = indices(len(own))
            items = array([*range(1, len(slot) + 1)])
            branches.append(Branch(after, array(own), array(slot), items, array(indices(len(own)))))
        items = array([READOUT_SLOT, USER_SLOT, *range(1, len(slots))][: len(slots)])
        made.append(Prompt(array(text), array(slots), items, array(indices(len(text))), tuple(branches)))
    return made


def wholes(prompt: Prompt) -> list[tuple[list[int], IntArray]]:
    """Tokens and read-outs of the trunk, and of the trunk continued by each branch."""
    return [(prompt.token_T.tolist(), prompt.readout_R)] + [
        ([*prompt.token_T[: branch.after].tolist(), *branch.token_T.tolist()], branch.after + branch.readout_R)
        for branch in prompt.branches
    ]


def seen(packed: PackedPrompts, store: list[Token] | None = None) -> list[list[Token]]:
    """The (token, position) pairs that each token of the trained stream sees, itself last.

    Derived from the groups, and checked against the segments where the stream has them.
    """
    keys = [] if packed.frozen is None else pairs(packed.frozen)
    keys += [(store or [])[row] for row in packed.cached_M.tolist()] + pairs(packed.trained)
    laid = []
    for group in packed.trained.groups:
        for key_K, first_Q, last_Q in zip(group.key_GK, group.first_GQ, group.last_GQ, strict=True):
            laid += [
                [keys[key] for key in key_K[first : last + 1].tolist()]
                for first, last in zip(first_Q.tolist(), last_Q.tolist(), strict=True)
            ]
    assert packed.trained.query_index_T is not None
    views = [laid[place] for place in packed.trained.query_index_T.tolist()]
    if (segments := packed.trained.segments) is not None:
        starts = list(zip(segments.cu_query_E.tolist(), segments.cu_key_E.tolist(), strict=True))
        sizes = [(stop - start, start_key, stop_key) for (start, start_key), (stop, stop_key) in pairwise(starts)]
        seen_N = [
            [keys[key] for key in segments.key_J[start:stop].tolist()[: stop - start - queries + 1 + query]]
            for queries, start, stop in sizes
            for query in range(queries)
        ]
        assert seen_N == views
        assert segments.max_query == max(queries for queries, _, _ in sizes)
        assert segments.max_key == max(stop - start for _, start, stop in sizes)
    return views


def pairs(stream: Stream) -> list[Token]:
    """(token, position) of each key of a stream."""
    return list(zip(stream.token_T.tolist(), stream.position_T.tolist(), strict=True))


def check_readouts(packed: PackedPrompts, some: list[Prompt], store: list[Token] | None = None) -> None:
    expected = [
        (number, list(zip(tokens[: at + 1], range(at + 1), strict=True)))
        for number, prompt in enumerate(some)
        for tokens, readout_R in wholes(prompt)
        for at in readout_R.tolist()
    ]
    views = seen(packed, store)
    found = [
        (number, views[at])
        for number, at in zip(packed.readout_prompt_R.tolist(), packed.readout_R.tolist(), strict=True)
    ]
    assert found == expected
    assert packed.useful_tokens == sum(prompt.tokens for prompt in some)


@light
@given(prompts())
def test_a_read_out_sees_its_prompt_and_nothing_else(some: list[Prompt]) -> None:
    for frozen_prefix in (True, False):
        packed = pack(some, frozen_prefix=frozen_prefix)
        check_readouts(packed, some)
        assert (packed.frozen is None) != frozen_prefix
    check_readouts(pack_rows(some, ROW), some)


@light
@given(prompts(), prompts(), st.integers(24, 60))
def test_cached_tokens_are_seen_and_not_run(some: list[Prompt], others: list[Prompt], tokens: int) -> None:
    """Here, rows of the cache are (token, position) pairs, computed part by part like keys."""
    rows = PrefixCacheIndex.of_prompts(some)
    store: list[Token] = []
    for part in rows.parts(tokens):
        keys = [store[row] for row in part.before_M.tolist()] + pairs(part.stream)
        assert part.first == len(store)
        assert len(part.stream.token_T) <= tokens
        for group in part.stream.groups:
            for query_Q, key_K, last_Q in zip(group.query_GQ, group.key_GK, group.last_GQ, strict=True):
                at, last = int(query_Q[0]), int(last_Q[0])
                assert [position for _, position in (keys[key] for key in key_K[: last + 1].tolist())] == list(
                    range(last + 1)
                )
                assert keys[int(key_K[last])] == pairs(part.stream)[at]
        store += pairs(part.stream)
    assert len(store) == len(rows)
    packed = pack([*some, *others], cached=rows.by_prefix)
    check_readouts(packed, [*some, *others], store)
    of_others = pack(others).frozen
    assert packed.frozen is not None
    assert of_others is not None
    assert len(packed.frozen.token_T) <= len(of_others.token_T)
    assert packed.run_tokens == len(packed.frozen.token_T) + len(packed.trained.token_T)


@light
@given(prompts())
def test_slots_are_those_of_the_prompts_in_order(some: list[Prompt]) -> None:
    packed = pack(some)
    token_T, position_T = packed.trained.token_T, packed.trained.position_T
    found = [
        (int(token_T[at]), int(position_T[at]), item, number)
        for at, item, number in zip(
            packed.slot_S.tolist(), packed.slot_item_S.tolist(), packed.slot_prompt_S.tolist(), strict=True
        )
    ]
    expected = []
    for number, prompt in enumerate(some):
        parts = [(0, prompt.token_T, prompt.slot_S, prompt.item_S)]
        parts += [(branch.after, branch.token_T, branch.slot_S, branch.item_S) for branch in prompt.branches]
        for shift, said_T, slot_S, shown_S in parts:
            expected += [
                (int(said_T[at]), shift + at, item, number)
                for at, item in zip(slot_S.tolist(), shown_S.tolist(), strict=True)
            ]
    assert found == expected
    for way in (packed, pack_rows(some, ROW)):
        item_S = way.slot_item_S
        masks = ((way.learned_K, item_S == READOUT_SLOT), (way.shown_I, item_S > 0), (way.user_V, item_S == USER_SLOT))
        assert [indices.tolist() for indices, _ in masks] == [mask.nonzero().flatten().tolist() for _, mask in masks]


@light
@given(prompts())
def test_nothing_before_a_slot_is_run_more_than_once(some: list[Prompt]) -> None:
    """No two segments of the frozen pass continue the same context with the same eight tokens."""
    packed = pack(some)
    assert packed.frozen is not None
    assert packed.run_tokens == len(packed.frozen.token_T) + len(packed.trained.token_T)
    begun = []
    for group in packed.frozen.groups:
        for query_Q, key_K, last_Q in zip(group.query_GQ, group.key_GK, group.last_GQ, strict=True):
            context = tuple(packed.frozen.token_T[key_K[: int(last_Q[0])]].tolist())
            length = int(last_Q.max()) - int(last_Q[0]) + 1
            begun.append((context, tuple(packed.frozen.token_T[query_Q[:length]].tolist()[:8])))
    assert len(begun) == len(set(begun))


def test_prefixes_of_eight_tokens_are_shared() -> None:
    def prompt(*tokens: int) -> Prompt:
        end = array([len(tokens)])
        return Prompt(array([*tokens, 0]), end, array([READOUT_SLOT]), end)

    instruction = range(10, 20)
    packed = pack([prompt(*instruction, 1, 2), prompt(*instruction, 3), prompt(*instruction), prompt(10, 11, 12)])
    assert packed.frozen is not None
    assert sorted(packed.frozen.token_T.tolist()) == sorted([*instruction, 1, 2, 3, 10, 11, 12])
    assert (packed.useful_tokens, packed.run_tokens) == (40, 20)


def test_few_groups_and_little_padding() -> None:
    """Group sizes are rounded up to powers of two, so the number of groups does not grow with the batch."""
    rng = np.random.default_rng(0)
    some = []
    for length in rng.integers(20, 60, 200):
        end = array([int(length) - 1])
        some.append(Prompt(rng.integers(1, 999, length), end, array([READOUT_SLOT]), end))
    packed = pack(some)
    assert packed.frozen is not None
    assert len(packed.frozen.groups) == 2
    assert len(packed.trained.groups) == 2
    cells = sum(group.query_GQ.numel() for group in packed.frozen.groups)
    assert cells < 1.5 * len(packed.frozen.token_T)


def test_a_long_prompt_is_cut_into_segments() -> None:
    end = array([299])
    prompt = Prompt(np.arange(1, 301), array([0, 299]), array([1, READOUT_SLOT]), end)
    packed = pack([prompt])
    check_readouts(packed, [prompt])
    assert sorted(group.query_GQ.shape[1] for group in packed.trained.groups) == [44, 128, 128]


def test_rows_are_filled_longest_first() -> None:
    """In the order given, first fit would put 6, 6 and 4 together and need a fourth row."""
    some = [Prompt(np.ones(n, np.int64), NOTHING, NOTHING, array([n - 1])) for n in (6, 6, 4, 18, 18, 20)]
    packed = pack_rows(some, 24)
    assert (packed.useful_tokens, packed.run_tokens) == (72, 72)


def test_an_empty_batch_is_one_token_without_a_read_out() -> None:
    for packed in (pack([]), pack([], frozen_prefix=False), pack_rows([], ROW)):
        assert packed.useful_tokens == 0
        assert len(packed.trained.token_T) >= 1
        for part in (packed.slot_S, packed.slot_item_S, packed.readout_R, packed.readout_prompt_R):
            assert part.shape == (0,)
            assert not part.dtype.is_floating_point
