"""The bottom layer: what a run is, checked before anything expensive starts."""

from trainer.config.load import ConfigError, config_hash, dump_config, load_config, parse_config, with_absolute_paths
from trainer.config.schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LLMConfig,
    LLMSRecConfig,
    RunConfig,
    SASRecConfig,
    TrainConfig,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LLMConfig",
    "LLMSRecConfig",
    "RunConfig",
    "SASRecConfig",
    "TrainConfig",
    "config_hash",
    "dump_config",
    "load_config",
    "parse_config",
    "with_absolute_paths",
]
