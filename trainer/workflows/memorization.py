"""Ask a language model for the catalog of a dataset (`trainer.evaluation.memorization`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from shards.manifest import read_manifest
from trainer.config import LLMConfig
from trainer.data.raw.items import RawItems
from trainer.distributed import alone
from trainer.evaluation.memorization import Generate, Memorized, probe
from trainer.evaluation.progress import Progress
from trainer.nn.llm.backbone import check_llm, load_tokenizer
from trainer.nn.llm.lm_head import load_causal_lm

_BATCH = 32
"""Prompts that are continued together."""
_MORE_TOKENS = 4
"""Tokens that an answer may have beyond the longest one expected, so that a longer one is not cut to a right one."""


def memorized(data: Path, llm: LLMConfig, number: int, *, shots: int, seed: int) -> Memorized:
    """Ask the whole model, without any training, about a dataset's catalog.

    Raises:
        DatasetError, LLMError, ValueError: no dataset, no causal LM, or too few items.
    """
    check_llm(llm)
    items = RawItems.read(data, read_manifest(data).num_items)
    return probe(items, _greedy(llm), number, shots=shots, seed=seed)


def _greedy(llm: LLMConfig) -> Generate:
    device = alone().device
    tokenizer, model = load_tokenizer(llm), load_causal_lm(llm).to(device).eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.no_grad()
    def generate(prompts: Sequence[str], expected: Sequence[str]) -> list[str]:
        answers: list[str] = []
        with Progress("asking", len(prompts)) as progress:
            for start in range(0, len(prompts), _BATCH):
                batch = tokenizer(list(prompts[start : start + _BATCH]), padding=True, return_tensors="pt").to(device)
                longest = max(_length(tokenizer, text) for text in expected[start : start + _BATCH])
                # Not the model's own settings, which may sample or forbid repetition.
                settings = GenerationConfig(
                    do_sample=False,
                    max_new_tokens=longest + _MORE_TOKENS,
                    stop_strings=["\n"],
                    eos_token_id=model.generation_config.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
                written = model.generate(**batch, generation_config=settings, tokenizer=tokenizer)
                texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                answers += [text.split("\n")[0] for text in texts]
                progress.add(len(texts))
        return answers

    return generate


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
