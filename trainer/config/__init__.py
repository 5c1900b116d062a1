"""Run configuration: typed sections, loading and validation. The bottom layer of the trainer; imports no torch."""

from trainer.config.choices import Candidates, HistoryOrder, Split, Task, Tie, TrainingOrder
from trainer.config.id_systems import BERT4RecConfig, GRU4RecConfig, NextItNetConfig, SASRecConfig
from trainer.config.llm_systems import (
    ALLMRecConfig,
    CoLLMConfig,
    LLaRAConfig,
    LLM4RecConfig,
    LLMConfig,
    LLMSRecConfig,
    LoRAConfig,
    TALLRecConfig,
    extensions,
)
from trainer.config.load import (
    ConfigError,
    applicable_overrides,
    config_hash,
    dump_config,
    flatten,
    load_config,
    parse_config,
    with_absolute_paths,
)
from trainer.config.schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    RunConfig,
    SystemConfig,
    TrainConfig,
    built_on,
)
from trainer.config.text_systems import EncoderConfig

__all__ = [
    "ALLMRecConfig",
    "BERT4RecConfig",
    "Candidates",
    "CoLLMConfig",
    "ConfigError",
    "DataConfig",
    "EncoderConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GRU4RecConfig",
    "HistoryOrder",
    "LLM4RecConfig",
    "LLMConfig",
    "LLMSRecConfig",
    "LLaRAConfig",
    "LoRAConfig",
    "NextItNetConfig",
    "RunConfig",
    "SASRecConfig",
    "Split",
    "SystemConfig",
    "TALLRecConfig",
    "Task",
    "Tie",
    "TrainConfig",
    "TrainingOrder",
    "applicable_overrides",
    "built_on",
    "config_hash",
    "dump_config",
    "extensions",
    "flatten",
    "load_config",
    "parse_config",
    "with_absolute_paths",
]
