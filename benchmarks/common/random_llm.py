"""Language models of any shape with random weights, and a tokenizer, in Hugging Face folders: nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.nn.pretrained import in_dtype
from trainer.planner.llm_shape import LLMShape

_ELEMENT = {"float32": 4, "bfloat16": 2}


def write_tokenizer(folder: Path, texts: Sequence[str], *, vocabulary: int) -> None:
    """Train a byte-level BPE tokenizer on texts, whose words become tokens as far as the vocabulary allows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|begin|>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|eot_id|>")
    fast.save_pretrained(folder)


def write_random_llm(folder: Path, settings: Mapping[str, Any], device: torch.device, dtype: str) -> None:
    """Write a causal LM with random weights, drawn on `device`: billions of them take seconds on a GPU.

    Args:
        settings: as in its config.json; the LM head is tied to the token table, because no system here needs it.

    Raises:
        OSError: the disk has no room for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    needed = LLMShape.of_settings(dict(settings), json.dumps(dict(settings))).parameters * _ELEMENT[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < 1.05 * needed:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free and the LLM takes {needed / 1e9:.1f}: choose --folder")
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(**settings, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **in_dtype(dtype))
    model.save_pretrained(folder)
