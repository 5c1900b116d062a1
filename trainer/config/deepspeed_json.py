"""The DeepSpeed configuration of a run: a file of `ds_configs/` plus what follows from the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, TrainConfig

CONFIGS = Path(__file__).parents[2] / "ds_configs"

# Keys that the run's own configuration decides; a second value in the JSON file would silently lose.
_OURS = {
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
    """What `deepspeed.initialize` takes.

    The trained parts stay in fp32; the frozen LLM has its own dtype, so DeepSpeed's mixed precision stays off.

    Args:
        name: a name in `ds_configs/` or a path.
        micro_batches: forward passes a rank makes for one optimizer step.

    Raises:
        ConfigError: no such file, not JSON, or a key that the run's configuration decides.
    """
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        raise ConfigError(
            f"engine.deepspeed={name}: no such file (names in ds_configs: {', '.join(config_names())}; "
            "or a path ending in .json)"
        )
    try:
        settings: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a JSON object, as the files in ds_configs do")
    for key in _OURS.keys() & settings.keys():
        raise ConfigError(f"{path} sets '{key}': remove it there and use {_OURS[key]} instead")
    return settings | {
        # Shares of a batch may be uneven, so DeepSpeed's own count of samples has no meaning here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": train.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def config_names() -> list[str]:
    """What `engine.deepspeed` may name: the files for any machine, then those of a device (`a6000/zero1`)."""
    names = [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.glob("**/*.json")]
    return sorted(names, key=lambda name: ("/" in name, name))


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))
