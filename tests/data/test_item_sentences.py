"""Item sentences: their text, how they are truncated, and how words are masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import EncoderConfig
from trainer.data.collators.base import BatchRows
from trainer.data.collators.sentences import cut_at_random
from trainer.data.encoder_texts import history_writer
from trainer.data.item_sentences import (
    NAME,
    NOT_MASKED,
    PADDING,
    START,
    VALUE,
    SentenceWriter,
    longest,
    sentence_writer,
)
from trainer.data.reading.histories import Histories
from trainer.nn.text_encoder import load_encoder_tokenizer

ITEMS = [
    {"title": "Amber Kelp", "brand": "Brass", "category": ""},
    {"title": "Denim", "brand": "", "category": "Flint, Grove"},
    {"title": "Hazel No. 7", "brand": "", "category": ""},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    return load_encoder_tokenizer(EncoderConfig(path=str(tiny_encoder)))


def _writer(tokenizer: Any, **limits: int) -> SentenceWriter:
    return sentence_writer(
        tokenizer, ITEMS, **{"max_attribute_tokens": 32, "max_items": 50, "max_tokens": 64, **limits}
    )


def _histories(*rows: list[int]) -> Histories:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    item_E = np.array([item for row in rows for item in row], np.int64)
    return Histories(np.arange(len(rows)) + 40, offsets, item_E, np.arange(len(item_E)))


def _read(tokenizer: Any, writer: SentenceWriter, history: Histories) -> list[list[tuple[str, int, int]]]:
    """(word, type, place) per real token."""
    texts = writer.histories(history)
    batch = writer.pad(texts, BatchRows(0, len(texts), len(texts)), longest(texts))
    columns = (batch.token_BT, batch.type_BT, batch.place_BT, batch.real_BT)
    rows = []
    for token_T, type_T, place_T, real_T in zip(*(column.tolist() for column in columns), strict=True):
        words = tokenizer.convert_ids_to_tokens(token_T)
        kept = list(zip(words, type_T, place_T, real_T, strict=True))
        assert all((word == "[PAD]") == (kind == PADDING) == (not real) for word, kind, _, real in kept)
        rows.append([(word, kind, place) for word, kind, place, real in kept if real])
    return rows


def test_a_history_reads_name_value_from_the_most_recent_item_back(tokenizer: Any) -> None:
    first, second = _read(tokenizer, _writer(tokenizer), _histories([3, 2, 1], [2, 2]))
    assert first[0] == ("[CLS]", START, 0)
    item = [("title", NAME, 1), ("amber", VALUE, 1), ("kelp", VALUE, 1), ("brand", NAME, 1), ("brass", VALUE, 1)]
    assert first[1:6] == item
    assert first[6:8] == [("title", NAME, 2), ("denim", VALUE, 2)]
    assert [word for word, _, place in first if place == 3][:2] == ["title", "hazel"]
    assert [place for word, _, place in second if word == "denim"] == [1, 2], "a repeated item counts as two items"


def test_limits_of_items_tokens_and_attributes(tokenizer: Any) -> None:
    history = _histories([3, 2, 1])
    assert {place for _, _, place in _read(tokenizer, _writer(tokenizer, max_items=2), history)[0]} == {0, 1, 2}
    cut = _read(tokenizer, _writer(tokenizer, max_tokens=8), history)[0]
    assert cut == _read(tokenizer, _writer(tokenizer), history)[0][:8], "the oldest items are cut"
    words = [word for word, _, _ in _read(tokenizer, _writer(tokenizer, max_attribute_tokens=2), history)[0]]
    assert words[:5] == ["[CLS]", "title", "amber", "brand", "brass"]


def test_items_alone_are_written_alike(tokenizer: Any) -> None:
    writer = _writer(tokenizer)
    alone = writer.items(np.array([2]))
    assert np.array_equal(alone[0], writer.histories(_histories([2]))[0])


def _many(tokenizer: Any, users: int, share: float, seed: int = 0) -> tuple[Any, Any, SentenceWriter]:
    writer = _writer(tokenizer)
    texts = writer.histories(_histories(*([[1, 2, 3, 1, 2]] * users)))
    clean = writer.pad(texts, BatchRows(0, users, users), longest(texts))
    return clean, writer.mask_words(texts, clean, share, np.arange(users), seed, 0), writer


def test_masking_is_15_percent_of_words_80_10_10(tokenizer: Any) -> None:
    clean, masked, writer = _many(tokenizer, 2000, 0.15)
    label, after = masked.label_BT.numpy(), masked.sentences.token_BT.numpy()
    chosen = label != NOT_MASKED
    real = clean.real_BT.numpy() & (clean.type_BT.numpy() != START)
    assert not (chosen & ~real).any()
    assert chosen.sum() / real.sum() == pytest.approx(0.15, abs=0.01)
    assert np.array_equal(label[chosen], clean.token_BT.numpy()[chosen])
    assert np.array_equal(after[~chosen], clean.token_BT.numpy()[~chosen])
    assert (after[chosen] == writer.mask).mean() == pytest.approx(0.8, abs=0.02)
    assert (after[chosen] == label[chosen]).mean() == pytest.approx(0.1, abs=0.02)
    assert after.max() < writer.vocabulary


def test_words_are_masked_whole(tokenizer: Any) -> None:
    writer = sentence_writer(
        tokenizer, [{"title": "Amberbrass linenkelp"}], max_attribute_tokens=32, max_items=9, max_tokens=64
    )
    assert not writer.begins_E.all(), "this test needs words of several tokens"
    texts = writer.histories(_histories(*([[1, 1]] * 300)))
    clean = writer.pad(texts, BatchRows(0, 300, 300), longest(texts))
    label_BT = writer.mask_words(texts, clean, 0.4, np.arange(300), 0).label_BT.numpy()
    chosen_BT = label_BT[:, 1:] != NOT_MASKED
    begins_T = writer.begins_E[texts[0][0]]
    assert chosen_BT.any()
    for place in np.flatnonzero(~begins_T):
        assert np.array_equal(chosen_BT[:, place], chosen_BT[:, place - 1])


def test_masks_are_addressed_by_user(tokenizer: Any) -> None:
    writer = _writer(tokenizer)
    texts = writer.histories(_histories(*([[1, 2, 3]] * 6)))
    clean = writer.pad(texts, BatchRows(0, 6, 6), longest(texts))
    whole = writer.mask_words(texts, clean, 0.3, np.arange(6), 7).label_BT
    part = writer.pad(texts[2:4], BatchRows(2, 2, 6), longest(texts))
    assert (writer.mask_words(texts[2:4], part, 0.3, np.arange(2, 4), 7).label_BT == whole[2:4]).all()
    assert not (whole[0] == whole[1]).all()
    assert not (writer.mask_words(texts, clean, 0.3, np.arange(6), 8).label_BT == whole).all()


def test_targets_are_any_item_but_the_first() -> None:
    train = _histories([5, 6, 7, 8], [9, 10])
    seen: list[set[int]] = [set(), set()]
    for epoch in range(40):
        history, target_U = cut_at_random(train, np.array([1, 1]), 0, epoch)
        for user, target in enumerate(target_U):
            own = history.item_E[history.offset_U1[user] : history.offset_U1[user + 1]].tolist()
            whole = [[5, 6, 7, 8], [9, 10]][user]
            assert own == whole[: whole.index(target)]
            seen[user].add(int(target))
    assert seen == [{6, 7, 8}, {10}]


def test_sentences_of_histories(tokenizer: Any) -> None:
    writer = history_writer(tokenizer, ["Amber Kelp", "Denim", "Flint " * 30], max_tokens=4, max_history=2)
    texts = writer.histories(_histories([1, 2, 1], [3]))
    words = tokenizer.convert_ids_to_tokens(texts.token_E[: texts.offset_N1[1]])
    assert words[0] == "[CLS]"
    assert "".join(words[1:]).replace("##", "").endswith("denim;amberkelp.[SEP]")
    assert texts.length_N.max() <= writer.longest
    assert writer.items(np.array([3])).length_N.tolist() == [texts.length_N[1]]
