"""Registry: from a configuration to a model and its collator."""

from __future__ import annotations

from typing import assert_never

import torch

from trainer.config import (
    ALLMRecConfig,
    BERT4RecConfig,
    CoLLMConfig,
    GRU4RecConfig,
    LLaRAConfig,
    LLMSRecConfig,
    NextItNetConfig,
    RunConfig,
    SASRecConfig,
    TALLRecConfig,
)
from trainer.config.text_systems import (
    ALLMRecStage1Config,
    CTRLAlignConfig,
    CTRLConfig,
    RecformerConfig,
    RecformerPretrainConfig,
)
from trainer.data.reading.counter_rng import torch_seed
from trainer.data.reading.dataset import Dataset
from trainer.models.system import AnySystem, System, changed_dependency, load_weights, vector_system
from trainer.runs.requirements import Sources, find_sources

__all__ = ["AnySystem", "System", "build_system", "changed_dependency", "load_weights", "vector_system"]


def build_system(config: RunConfig, dataset: Dataset, sources: Sources | None = None) -> AnySystem:
    """Build the system that `config.system` names, initialised from `config.seed`.

    Args:
        sources: the runs that it builds on, if the preflight has found them already.

    Raises:
        ValueError: something it needs (LLM, teacher, titles) is missing or does not fit; the message names the cure.
    """
    sources = sources or find_sources(config, dataset.manifest)
    torch.manual_seed(torch_seed(config.seed, 0))
    return _build(config, dataset, sources)


def _build(config: RunConfig, dataset: Dataset, sources: Sources) -> AnySystem:
    """One case per system. Builders are imported lazily, because transformers and peft take seconds to import."""
    match config.system:
        case SASRecConfig() as system:
            from trainer.models.by_id.build import build_sasrec

            return build_sasrec(config, system, dataset)
        case GRU4RecConfig() as system:
            from trainer.models.by_id.build import build_gru4rec

            return build_gru4rec(config, system, dataset)
        case BERT4RecConfig() as system:
            from trainer.models.by_id.build import build_bert4rec

            return build_bert4rec(config, system, dataset)
        case NextItNetConfig() as system:
            from trainer.models.by_id.build import build_nextitnet

            return build_nextitnet(config, system, dataset)
        case (TALLRecConfig() | LLaRAConfig() | CoLLMConfig() | ALLMRecConfig() | LLMSRecConfig()) as system:
            from trainer.models.llm.build import build_llm4rec

            return build_llm4rec(config, system, dataset, sources)
        case ALLMRecStage1Config() as system:
            from trainer.models.by_text.build import build_a_llmrec_stage1

            return build_a_llmrec_stage1(config, system, dataset, sources)
        case CTRLConfig() as system:
            from trainer.models.by_text.build import build_ctrl

            return build_ctrl(config, system, dataset, sources)
        case CTRLAlignConfig() as system:
            from trainer.models.by_text.build import build_ctrl_align

            return build_ctrl_align(config, system, dataset)
        case RecformerPretrainConfig() as system:
            from trainer.models.by_text.build import build_recformer_pretrain

            return build_recformer_pretrain(config, system, dataset)
        case RecformerConfig() as system:
            from trainer.models.by_text.build import build_recformer

            return build_recformer(config, system, dataset, sources)
        case unknown:
            assert_never(unknown)
