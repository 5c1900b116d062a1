"""Measure the cost of a checkpoint at the size of a 3B language model's trained parts.

    python -m benchmarks.cluster.saving

LLM-SRec with all its trained modules at width 3072 (22.8 M parameters), around a random language model of that width
whose only layer is narrow, because frozen weights are not saved. One real step creates Adam's moments, then the
trainer's own `save` is timed: gathering, writing, hashing, syncing, renaming. The share of a run that saves take
follows from the default of `train.save_minutes`; the smallest `train.save_every` at which saves take less than 1 %
follows from the step time of the whole 3B model that `launchers/plan.py` estimates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.setting import LLMS, PRESET, add_arguments, overrides
from trainer.config import TrainConfig, load_config
from trainer.distributed import start, stop
from trainer.engine.checkpoint import save
from trainer.engine.rank_status import RankStatus
from trainer.runs.preflight import preflight
from trainer.workflows.setup import set_up

_PLAN = Path(__file__).parents[2] / "launchers" / "plan.py"
_LLM = LLMS["Llama-3.2-3B"]
_DEVICES: Sequence[tuple[str, int]] = (("a6000", 1), ("a6000", 8), ("h200", 1), ("h200", 8))


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        _write_llm(folder / "llm", options.llm)
        saves = _time_saves(options, folder)
        seconds = statistics.median(saves["seconds"])
        plain = [_plain_write(folder / "plain", saves["bytes"]) for _ in range(options.repeat)]
        steps = _step_seconds(options, folder / "llm")
    result = {
        "machine": describe(),
        **saves,
        "median_seconds": round(seconds, 3),
        "median_cpu_seconds": round(statistics.median(saves["cpu_seconds"]), 3),
        "median_seconds_of_a_plain_write_and_fsync": round(statistics.median(plain), 3),
        **shares(seconds, steps),
    }
    write(options.out, result)
    print(json.dumps(result, indent=1))


def _write_llm(folder: Path, tokenizer: Path) -> None:
    """Write a random LLM as wide as the 3B model, with the tokenizer of the LLM in `tokenizer`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    loaded.save_pretrained(folder)
    narrow = _LLM | {"intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": len(loaded)}
    config = AutoConfig.for_model(**narrow, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)


def _time_saves(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    changes = [
        f"output={folder / 'run'}",
        "train.batch_size=2",
        f"system.llm.path={folder / 'llm'}",
        "data.verify=false",
    ]
    job = set_up(preflight(load_config(PRESET, [*overrides(options), *changes]), ranks=1), start())
    batches = next(job.loader.epoch(0))
    rows = len(batches.user_U)
    # A real step, because Adam has no moments to save before the first one.
    job.engine.step(batches.micro_batches, total_rows=rows, seed=0, lr=1e-4, status=RankStatus())
    seconds, cpu_seconds = [], []
    for step in range(1, options.repeat + 1):
        began, cpu_began = time.perf_counter(), time.process_time()
        assert save(job.engine, job.run, replace(job.progress, step=step), job.identity, best=False, keep=2)
        seconds.append(round(time.perf_counter() - began, 3))
        cpu_seconds.append(round(time.process_time() - cpu_began, 3))
    stop()
    return {
        "trained_parameters": sum(parameter.numel() for parameter in job.engine.trained.values()),
        "bytes": sum(file.stat().st_size for file in job.run.step_path(options.repeat).iterdir()),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "others_running": round(os.getloadavg()[0], 1),
    }


def _plain_write(file: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes: a lower bound for a checkpoint of that size on this disk."""
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with file.open("wb") as out:
        for _ in range(-(-size // len(block))):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


def _step_seconds(options: argparse.Namespace, llm: Path) -> dict[str, float]:
    """Estimated seconds per step of the 3B model with the recommended settings, by number and kind of devices.

    Args:
        llm: folder of the LLM; its config.json is replaced by the 3B model's, which is all that `plan.py` reads.
    """
    (llm / "config.json").write_text(json.dumps(_LLM))
    steps = {}
    for kind, devices in _DEVICES:
        changes = [*overrides(options), f"system.llm.path={llm}", "system.llm.dtype=bfloat16"]
        size = ["--devices", str(devices), "--kind", kind]
        command = [sys.executable, str(_PLAN), str(PRESET), *size, "--json", *changes]
        plan = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        steps[f"{devices} x {kind}"] = plan["recommended"]["step_seconds"]
    return steps


def shares(seconds: float, steps: dict[str, float]) -> dict[str, Any]:
    """Share of a run that saves of `seconds` each take, and the `train.save_every` that keeps them under 1 %.

    Args:
        steps: seconds per step, by devices.
    """
    between = 60 * (TrainConfig().save_minutes or math.inf)
    return {
        "default_seconds_between_saves": between,
        "share_of_a_run": round(seconds / (between + seconds), 4),
        "by_devices": {
            name: {
                "step_seconds": round(step, 3),
                "save_every_for_one_percent": math.ceil(99 * seconds / step),
            }
            for name, step in steps.items()
        },
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.cluster.saving", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--repeat", type=int, default=10, help="saves, and plain writes, that are timed")
    parser.add_argument(
        "--folder", type=Path, help="where to write, on the disk to measure (default: the system's temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "saving.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
