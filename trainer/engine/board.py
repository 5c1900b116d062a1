"""A run in TensorBoard: besides its curves, which settings it had, to read and to sort runs by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.config import RunConfig, dump_config

_COMPARED = {"seed", "system", "train"}
"""What of the configuration is a column of the table of runs."""
_METRICS = ("HR@10", "NDCG@10", "MRR")


def tag(name: str) -> str:
    """What a number of `metrics.jsonl` is called: TensorBoard sorts groups by name and unfolds the first two, which
    shall be those of learning (`train/`, `valid/`), and not speed and memory."""
    return name.replace("speed/", "work/").replace("memory/", "work/memory_")


def open_board(path: Path, config: RunConfig, *, done_steps: int) -> SummaryWriter:
    """The writer of a run's events; points of steps that a resumed run repeats are hidden."""
    board: Any = SummaryWriter(str(path), purge_step=done_steps + 1)
    text = "".join(f"    {line}\n" for line in dump_config(config).splitlines())  # indented: shown as it stands
    board.add_text("config", text, global_step=done_steps)
    columns = dict(_leaves(config.model_dump(mode="json", include=_COMPARED)))
    # Names alone: TensorBoard takes the values from the curves.
    metrics = dict.fromkeys((f"valid/{name}" for name in dict.fromkeys((config.train.metric, *_METRICS))), 0.0)
    for summary in hparams(columns, metrics):  # type: ignore[no-untyped-call]
        board.file_writer.add_summary(summary)
    writer: SummaryWriter = board
    return writer


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, str | float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        elif value is not None:
            yield above + key, value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
