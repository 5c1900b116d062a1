"""The bottom layer: what a run is, checked before anything expensive starts."""

from trainer.config.id_systems import SASRecConfig
from trainer.config.llm_systems import LLMConfig, LLMSRecConfig
from trainer.config.load import ConfigError, config_hash, dump_config, load_config, parse_config, with_absolute_paths
from trainer.config.schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    RunConfig,
    SystemConfig,
    Task,
    TrainConfig,
    built_on,
)
from trainer.config.text_systems import ALLMRecStage1Config, EncoderConfig

__all__ = [
    "ALLMRecStage1Config",
    "ConfigError",
    "DataConfig",
    "EncoderConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LLMConfig",
    "LLMSRecConfig",
    "RunConfig",
    "SASRecConfig",
    "SystemConfig",
    "Task",
    "TrainConfig",
    "built_on",
    "config_hash",
    "dump_config",
    "load_config",
    "parse_config",
    "with_absolute_paths",
]
