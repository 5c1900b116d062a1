"""Text encoders: results do not depend on padding or on the split of a batch, and unsuitable models are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build_encoder, build_llm
from torch import Tensor

from trainer.config import EncoderConfig
from trainer.data.collators.base import BatchRows
from trainer.data.encoder_texts import PaddedTexts, TokenLists, joined, tokenize
from trainer.nn.pretrained import LLMError
from trainer.nn.text_encoder import (
    TextVectors,
    check_encoder,
    encoder_fingerprint,
    load_encoder,
    load_encoder_tokenizer,
)

TITLES = ["Amber Brass No. 3", "Kelp", "Grove Hazel Ivory Jade No. 17 Denim", "Linen [SEP] Flint"]


def _config(path: Path, **settings: object) -> EncoderConfig:
    return EncoderConfig.model_validate({"path": str(path), **settings})


def _texts(path: Path) -> TokenLists:
    return tokenize(load_encoder_tokenizer(_config(path)), TITLES, 32)


def _read(reader: TextVectors, texts: TokenLists, which: list[int], length: int | None = None) -> Tensor:
    with torch.no_grad():
        vectors: Tensor = reader(texts.padded(np.array(which), BatchRows(0, len(which), len(which)), length))
    return vectors


@pytest.mark.parametrize("family", ["bert", "roberta", "longformer", "electra"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_and_other_texts_change_nothing(tmp_path: Path, family: str, pooling: str) -> None:
    folder = build_encoder(tmp_path / family, family=family)
    reader = TextVectors(load_encoder(_config(folder)), pooling).eval()
    texts = _texts(folder)
    together = _read(reader, texts, [0, 1, 2, 3], 30)
    for text in range(len(TITLES)):
        torch.testing.assert_close(_read(reader, texts, [text])[0], together[text], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_mean_pooling_by_hand(tiny_encoder: Path) -> None:
    reader = TextVectors(load_encoder(_config(tiny_encoder)), "mean").eval()
    texts = _texts(tiny_encoder)
    tokens = torch.from_numpy(texts.token_E[: texts.offset_N1[1]])[None]
    with torch.no_grad():
        hidden = reader.encoder.encoder(input_ids=tokens).last_hidden_state[0]
    expected = sum(hidden[place] for place in range(len(hidden))) / len(hidden)
    torch.testing.assert_close(_read(reader, texts, [0, 2])[0], expected, rtol=1e-4, atol=1e-5)


def test_special_tokens_in_a_text_are_text(tiny_encoder: Path) -> None:
    tokenizer = load_encoder_tokenizer(_config(tiny_encoder))
    texts = _texts(tiny_encoder)
    tokens = texts.token_E[texts.offset_N1[3] : texts.offset_N1[4]].tolist()
    assert tokens.count(tokenizer.sep_token_id) == 1
    assert tokens[-1] == tokenizer.sep_token_id


def test_texts_are_cut_and_keep_their_end(tiny_encoder: Path) -> None:
    tokenizer = load_encoder_tokenizer(_config(tiny_encoder))
    texts = tokenize(tokenizer, ["Amber " * 50], 8)
    assert texts.length_N.tolist() == [8]
    assert texts.token_E[[0, -1]].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_padded_texts_by_hand() -> None:
    batch = joined([[5, 6, 7], [], [8]], padding=9).padded(np.array([2, 0, 1]), BatchRows(0, 3, 3), 4)
    assert batch.token_BT.tolist() == [[8, 9, 9, 9], [5, 6, 7, 9], [9, 9, 9, 9]]
    assert batch.real_BT.sum(1).tolist() == [1, 3, 0]


@pytest.mark.parametrize("family", ["bert", "longformer"])
def test_dropout_does_not_depend_on_how_a_batch_is_split(tmp_path: Path, family: str) -> None:
    folder = build_encoder(tmp_path / family, family=family)
    reader = TextVectors(load_encoder(_config(folder), dropout=0.3), "mean").train()
    texts = _texts(folder)
    length = int(texts.length_N.max())

    def read(start: int, stop: int) -> Tensor:
        torch.manual_seed(3)
        vectors: Tensor = reader(texts.padded(np.arange(start, stop), BatchRows(start, stop - start, 4), length))
        return vectors

    whole = read(0, 4)
    for start, stop in [(0, 1), (1, 4), (2, 2)]:  # the last share is empty: a rank without users
        torch.testing.assert_close(read(start, stop), whole[start:stop], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(reader.eval()(texts.padded(np.arange(4), BatchRows(0, 4, 4))), whole, atol=1e-3)


def test_first_layers_only(tiny_encoder: Path) -> None:
    one, two = (load_encoder(_config(tiny_encoder, layers=layers)) for layers in (1, None))
    assert len(list(one.encoder.get_submodule("encoder.layer").children())) == 1
    assert encoder_fingerprint(_config(tiny_encoder, layers=1)) != encoder_fingerprint(_config(tiny_encoder))
    for (name, first), second in zip(one.named_parameters(), two.state_dict().values(), strict=False):
        assert torch.equal(first, second), name


def test_refusals(tiny_encoder: Path, tmp_path: Path) -> None:
    cure = r"set system\.encoder\.path to a folder"
    with pytest.raises(LLMError, match=r"layers=9, but .* has 2 layers: lower it"):
        check_encoder(_config(tiny_encoder, layers=9), 8, "system.max_tokens")
    with pytest.raises(LLMError, match=r"system\.max_tokens=129, but .* reads at most 128 tokens: lower it"):
        check_encoder(_config(tiny_encoder), 129, "system.max_tokens")
    roberta = build_encoder(tmp_path / "roberta", family="roberta")
    check_encoder(_config(roberta), 127, "system.max_tokens")
    with pytest.raises(LLMError, match="at most 127 tokens"):
        check_encoder(_config(roberta), 128, "system.max_tokens")
    llm = build_llm(tmp_path / "llm")
    with pytest.raises(LLMError, match=f"is not a text encoder: it holds a model of type 'llama'; {cure}"):
        check_encoder(_config(llm), 8, "system.max_tokens")
    broken = Path(shutil.copytree(tiny_encoder, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"x")
    with pytest.raises(LLMError, match=f"cannot load the weights .*{cure}"):
        load_encoder(_config(broken))
    for name in ("tokenizer.json", "vocab.txt"):
        (broken / name).unlink(missing_ok=True)
    with pytest.raises(LLMError, match="has no tokenizer"):
        load_encoder_tokenizer(_config(broken))


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.nn.pretrained.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LLMError, match=r"path=nobody/none is not a text encoder: .*hub cannot be reached"):
        check_encoder(EncoderConfig(path="nobody/none"), 8, "system.max_tokens")


def test_padded_texts_are_typed_batches(tiny_encoder: Path) -> None:
    batch = _texts(tiny_encoder).padded(np.array([0]), BatchRows(0, 1, 1))
    assert isinstance(batch, PaddedTexts)
    assert batch.token_BT.dtype == torch.long
