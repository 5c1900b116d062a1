"""Language models large enough for their memory and FLOPs to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import build_llm

SIZE = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 400,
}  # fmt: skip


def build_larger_llm(folder: Path, *, family: str = "llama", layers: int = 6, **settings: Any) -> Path:
    """Like `build_llm`, but wider."""
    from transformers import AutoConfig, AutoModelForCausalLM

    build_llm(folder, family=family)
    config = AutoConfig.for_model(
        family, num_hidden_layers=layers, max_position_embeddings=512, head_dim=32, **(SIZE | settings)
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
