"""The DeepSpeed configuration of a run: a file of `ds_configs/` plus what follows from the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.manifest import parse_json
from trainer.config import ConfigError, TrainConfig

CONFIGS = Path(__file__).parents[2] / "ds_configs"

# DeepSpeed keys that the run configuration sets, and the option for each; a value in the JSON file would be silently
# overridden.
_SET_BY_RUN = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.betas and train.weight_decay",
    "scheduler": "train.lr_decay",
    "fp16": "system.llm.dtype",
    "bf16": "system.llm.dtype",
}


def load_deepspeed_json(name: str, train: TrainConfig, *, micro_batches: int) -> dict[str, Any]:
    """Load the configuration that `deepspeed.initialize` takes.

    Trained parameters stay in fp32 and the frozen LLM has its own dtype, so DeepSpeed's mixed precision stays off.

    Args:
        name: a name in `ds_configs/`, or a path that ends in `.json`.
        micro_batches: forward passes per rank and optimizer step.

    Raises:
        ConfigError: no such file, not a JSON object, or a key that the run configuration sets.
    """
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        raise ConfigError(
            f"engine.deepspeed={name}: no such file (names in ds_configs: {', '.join(config_names())}; "
            "or a path ending in .json)"
        )
    try:
        settings: Any = parse_json(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must contain a JSON object, like the files in ds_configs")
    for key in _SET_BY_RUN.keys() & settings.keys():
        raise ConfigError(f"{path} sets '{key}': remove it there and use {_SET_BY_RUN[key]} instead")
    # It would wait for the device twice per step; the training loop has its own.
    timers = {"timers": {"throughput": {"enabled": False}}}
    return (
        timers
        | settings
        | {
            # A placeholder: ranks may have uneven shares of a batch, so DeepSpeed's own count of samples is not used.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": train.grad_clip,
            # Let ZeRO take the torch.optim.Adam of trainer/engine/engine.py, even if a file offloads its states.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    )


def config_names() -> list[str]:
    """Names that `engine.deepspeed` accepts: files for any machine first, then device-specific ones (`a6000/zero1`)."""
    names = [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.glob("**/*.json")]
    return sorted(names, key=lambda name: ("/" in name, name))


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))
