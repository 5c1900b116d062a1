"""Number of parameters that a recommender around an LLM trains, counted on its real modules, on the meta device."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from trainer.config import LLM4RecConfig, SASRecConfig, Task
from trainer.models.by_id.sasrec import SASRec
from trainer.models.by_text.a_llmrec_stage1 import AutoEncoder
from trainer.models.llm.build import FrozenParts, build_distillation, build_reader
from trainer.models.llm.retrieval import LLM4Rec
from trainer.models.llm.variants import variant_of
from trainer.nn.llm.backbone import FrozenLLM
from trainer.planner.llm_shape import Adapters, LLMShape


def adapters_of(system: LLM4RecConfig) -> Adapters | None:
    """The adapters of a system; None if it has none."""
    lora = variant_of(system).lora
    return Adapters(lora.rank, lora.targets, lora.dropout > 0) if lora else None


@cache  # a decoder of 80 layers takes a second, and plans of many devices ask for the same one
def trained_parameters(
    system: LLM4RecConfig, shape: LLMShape, *, teacher_dim: int, item_dim: int, task: Task = "retrieval"
) -> int:
    """Number of parameters that the optimizer updates.

    Args:
        item_dim: width of the input of f_I: of the teacher's item table, or of A-LLMRec's stage-1 encoding of it.
    """
    variant = variant_of(system)
    with torch.device("meta"):
        encoder = AutoEncoder(teacher_dim, item_dim).encode if variant.items == "stage1" else None
        has_teacher = variant.item_slots or variant.user_vector or variant.distillation is not None
        teacher = SASRec(SASRecConfig(name="sasrec", dim=teacher_dim, heads=1), num_items=1) if has_teacher else None
        frozen = FrozenParts(teacher, encoder and encoder.requires_grad_(False), {})
        reader = build_reader(_meta_llm(shape), variant, frozen)
        model: nn.Module = reader
        if task == "retrieval":
            model = LLM4Rec(system, reader, build_distillation(variant, frozen))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _meta_llm(shape: LLMShape) -> FrozenLLM:
    """A decoder of this shape on the meta device, except for a token table of two rows.

    Learned tokens are initialised from the table, so it needs values.
    """
    settings = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=2,
        eos_token_id=1,
    )
    decoder = LlamaModel(settings)
    decoder.set_input_embeddings(nn.Embedding(2, shape.width, device="cpu"))
    return FrozenLLM(decoder)
