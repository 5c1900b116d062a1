"""The registry: from a configuration to a model and the collator that feeds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
from trainer.data.catalog import Dataset
from trainer.data.randomness import torch_seed
from trainer.models.build_ctrl import build_ctrl, build_ctrl_align
from trainer.models.build_ids import build_bert4rec, build_gru4rec, build_nextitnet, build_sasrec
from trainer.models.build_llm import build_llm4rec
from trainer.models.build_recformer import build_recformer, build_recformer_pretrain
from trainer.models.build_text import build_a_llmrec_stage1
from trainer.models.system import System, changed_part, load_weights

__all__ = ["System", "build_system", "changed_part", "load_weights"]

# One line a system: its configuration section, and the function (run, section, dataset) -> System.
_BUILDERS: Mapping[type, Callable[[RunConfig, Any, Dataset], System]] = {
    SASRecConfig: build_sasrec,
    GRU4RecConfig: build_gru4rec,
    BERT4RecConfig: build_bert4rec,
    NextItNetConfig: build_nextitnet,
    TALLRecConfig: build_llm4rec,
    LLaRAConfig: build_llm4rec,
    CoLLMConfig: build_llm4rec,
    ALLMRecConfig: build_llm4rec,
    LLMSRecConfig: build_llm4rec,
    ALLMRecStage1Config: build_a_llmrec_stage1,
    CTRLConfig: build_ctrl,
    CTRLAlignConfig: build_ctrl_align,
    RecformerPretrainConfig: build_recformer_pretrain,
    RecformerConfig: build_recformer,
}


def build_system(config: RunConfig, dataset: Dataset) -> System:
    """The system that `config.system` names, initialised from `config.seed`.

    Raises:
        ValueError: something it needs is missing or does not fit (LLM, teacher, titles); the message has the cure.
    """
    torch.manual_seed(torch_seed(config.seed, 0))
    return _BUILDERS[type(config.system)](config, config.system, dataset)
