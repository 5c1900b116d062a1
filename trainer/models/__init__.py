"""The registry: from a configuration to a model and the collator that feeds it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

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
from trainer.models.system import System, changed_part, load_weights

__all__ = ["System", "build_system", "changed_part", "load_weights"]

# One line a system: its configuration section, and where the function (run, section, dataset) -> System is found. It is
# imported when it is needed: transformers and peft take seconds, and most systems need only one of them or neither.
_BUILDERS: Mapping[type, tuple[str, str]] = {
    SASRecConfig: ("by_id.build", "build_sasrec"),
    GRU4RecConfig: ("by_id.build", "build_gru4rec"),
    BERT4RecConfig: ("by_id.build", "build_bert4rec"),
    NextItNetConfig: ("by_id.build", "build_nextitnet"),
    TALLRecConfig: ("llm.build", "build_llm4rec"),
    LLaRAConfig: ("llm.build", "build_llm4rec"),
    CoLLMConfig: ("llm.build", "build_llm4rec"),
    ALLMRecConfig: ("llm.build", "build_llm4rec"),
    LLMSRecConfig: ("llm.build", "build_llm4rec"),
    ALLMRecStage1Config: ("by_text.build_a_llmrec", "build_a_llmrec_stage1"),
    CTRLConfig: ("by_text.build_ctrl", "build_ctrl"),
    CTRLAlignConfig: ("by_text.build_ctrl", "build_ctrl_align"),
    RecformerPretrainConfig: ("by_text.build_recformer", "build_recformer_pretrain"),
    RecformerConfig: ("by_text.build_recformer", "build_recformer"),
}


def build_system(config: RunConfig, dataset: Dataset) -> System:
    """The system that `config.system` names, initialised from `config.seed`.

    Raises:
        ValueError: something it needs is missing or does not fit (LLM, teacher, titles); the message has the cure.
    """
    torch.manual_seed(torch_seed(config.seed, 0))
    module, function = _BUILDERS[type(config.system)]
    system: System = getattr(import_module(f"trainer.models.{module}"), function)(config, config.system, dataset)
    return system
