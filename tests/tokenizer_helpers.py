"""Tokenizers of every kind in Hugging Face folders, and the SentencePiece library as a reference for them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REAL_MODEL = Path(sys.prefix) / "data-only" / "mistral_common" / "data" / "tokenizer.model.v1"
"""Mistral 7B's SentencePiece model; see requirements/test-data.txt."""


def train_sentencepiece(path: Path, titles: Sequence[str], *, vocabulary: int = 500) -> Path:
    """Train a SentencePiece model on titles, with the settings of Llama's."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(titles),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    return path


def sentencepiece_folder(folder: Path, model: Path, **settings: Any) -> Path:
    """A tokenizer folder as LLMs ship it: `tokenizer.model` and a config that names the class that reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def prepending_folder(folder: Path, model: Path) -> Path:
    """`tokenizer.json` like Llama 2's on the hub: its normalizer prepends a space, even to a text that has one."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    rust = AutoTokenizer.from_pretrained(sentencepiece_folder(folder / "model", model)).backend_tokenizer
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.pre_tokenizer = None
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


class SentencePieceReference:
    """Tokenise with the SentencePiece library itself."""

    def __init__(self, model: Path) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        made_by_protobuf: Any = sentencepiece_model_pb2
        parsed = made_by_protobuf.ModelProto()
        parsed.ParseFromString(model.read_bytes())
        parsed.normalizer_spec.add_dummy_prefix = False
        self._whole = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self._inside = sentencepiece.SentencePieceProcessor(model_proto=parsed.SerializeToString())

    def whole(self, text: str) -> list[int]:
        """Token ids of a text on its own, with the space that SentencePiece prepends."""
        return list(self._whole.encode(text))

    def inside(self, text: str) -> list[int]:
        """Token ids of a text inside a longer one: no space is prepended."""
        return list(self._inside.encode(text))
