"""Users and titles far beyond any real ones: memory stays bounded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import ints, without_held_out

from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.prompts.packing import pack
from trainer.data.prompts.templates import prompt_template
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.histories import Histories

EVENTS = 1_000_000
ITEMS = 50_000


@pytest.fixture(scope="module")
def writer(tiny_llm: Path) -> PromptWriter:
    """Titles of 100,000 characters."""
    from transformers import AutoTokenizer

    titles = [f"Title {n} " + "word " * 20_000 for n in range(3)] + [f"T{n}" for n in range(ITEMS - 3)]
    template = prompt_template("code", item_slots=True, user_vector=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm, trust_remote_code=False)
    return PromptWriter(tokenizer, titles, template, max_title_tokens=32, max_tokens=512)


def peak(work: Callable[[], Any]) -> int:
    """Most bytes that `work` allocates at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("exclude_user", [True, False])
def test_users_with_a_million_events(writer: PromptWriter, exclude_user: bool) -> None:
    """A batch takes no more than some copies of its histories, 16 MB each."""
    item_E = 1 + np.arange(EVENTS, dtype=np.int64) % (ITEMS // 2)
    long = Histories(ints([0, 1]), ints([0, EVENTS, EVENTS + 3]), np.append(item_E, [1, 2, 3]), np.arange(EVENTS + 3))
    teacher = SequenceCollator(ITEMS, 128, negatives=0, fixed_length=False, seed=0)
    collator = RetrievalCollator(
        writer=writer, teacher=teacher, num_items=ITEMS, shown_history=10, candidates=4, exclude_user=exclude_user,
        targets="last", pack=pack, seed=0,
    )  # fmt: skip
    users = without_held_out(long)
    assert peak(lambda: collator.train(users, slice(0, 2), 0)) < 200 << 20
    batch = collator.train(users, slice(0, 2), 0)
    assert batch.sequence is not None
    assert batch.sequence.item_BL.shape == (2, 128)


def test_titles_of_a_hundred_thousand_characters(writer: PromptWriter) -> None:
    """They lose tokens, as any title that is too long does."""
    for item in (1, 2, 3):
        assert len(writer.item_prompt(item).token_T) < len(writer.item_prompt(4).token_T) + 32
    shown = ints([1, 2, 3, 1, 2, 3])
    assert len(writer.user_prompt(shown, np.arange(6) * 86_400_000).token_T) <= 512
