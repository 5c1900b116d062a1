"""A run in TensorBoard: which tags its numbers have, so that several runs are readable side by side without settings.

Losses, gradient norms and rates of different systems have different scales: their tags name the system, so that each
has its chart, shared by the runs of that system alone. Validation metrics share one chart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.config import RunConfig, dump_config, flatten

_COMPARED = {"seed", "system", "train"}
"""Sections of the configuration that are columns of TensorBoard's HPARAMS table."""
_NOT_COMPARED = {"train": {"log_every", "save_minutes", "save_every", "keep_checkpoints"}}
"""Settings in them that change no result."""
_SHARED = ("train/lr", "valid/", "work/goodput", "work/tokens_run_share", "work/memory")
"""Tags whose values have one scale in all systems."""
MAIN_METRICS = ("HR@10", "NDCG@10", "MRR")
PERCENT = 100
MAX_POINTS = 10_000
"""Items in the embedding projector, the most popular ones; it computes t-SNE for no more."""
MAX_DIMENSIONS = 200
"""Principal components that represent wider vectors: its files are text, and it starts with a PCA anyway."""


def tag(name: str, system: str) -> str:
    """The TensorBoard tag of a `metrics.jsonl` key.

    TensorBoard sorts tag groups by name and expands the first two; renaming `speed/` and `memory/` to `work/` makes
    these `best/` and `train/`.
    """
    renamed = name.replace("speed/", "work/").replace("memory/", "work/memory_")
    return renamed if renamed.startswith(_SHARED) else renamed + _of(system)


def _of(system: str) -> str:
    # Not in parentheses, in which the CUSTOM SCALARS tab expects the name of a run.
    return f" [{system}]"


def open_board(path: Path, config: RunConfig, *, done_steps: int) -> SummaryWriter:
    """Open a run's TensorBoard writer; earlier points of steps that a resumed run repeats are hidden."""
    board: Any = SummaryWriter(str(path), purge_step=done_steps + 1)
    text = "".join(f"    {line}\n" for line in dump_config(config).splitlines())  # markdown: a code block
    board.add_text("config", text, global_step=done_steps)
    board.add_custom_scalars(layout(config.system.name, with_llm=hasattr(config.system, "llm")))
    settings = flatten(config.model_dump(mode="json", include=_COMPARED, exclude=_NOT_COMPARED))
    columns = {".".join(keys): _shown(value) for keys, value in settings if value is not None}
    # Without its list of columns, which TensorBoard would take from one arbitrary run for all: then it finds them
    # itself, puts the settings in which runs differ first, and shows every curve's last value as a metric.
    _, start, end = hparams(columns, {})  # type: ignore[no-untyped-call]
    for summary in (start, end):
        board.file_writer.add_summary(summary)
    writer: SummaryWriter = board
    return writer


class Board:
    """TensorBoard as a tracker (`trainer.engine.recording.trackers`)."""

    def __init__(self, path: Path, config: RunConfig, *, done_steps: int) -> None:
        self._system = config.system.name
        self._writer: Any = open_board(path, config, done_steps=done_steps)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars under their tags."""
        for name, value in scalars.items():
            self._writer.add_scalar(tag(name, self._system), value, step)
        self._writer.flush()

    def validated(
        self, step: int, total: int, metrics: Mapping[str, float], *, chosen: str, better: bool, samples: str
    ) -> None:
        """Write metrics over the percent of the run, the best ones again, and the sample answers."""
        share = percent(step, total)
        for name in dict.fromkeys((chosen, *MAIN_METRICS)):
            if name in metrics:
                self._writer.add_scalar(f"valid_percent/{name}", metrics[name], share)
                if better:  # so that its last value, which HPARAMS shows, is that of the best checkpoint
                    self._writer.add_scalar(f"best/{name}", metrics[name], step)
        if samples:
            self._writer.add_text("answers", samples, step)
        self._writer.flush()

    def tested(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Write test metrics; see `add_test`."""
        add_test(self._writer, metrics, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def layout(system: str, *, with_llm: bool) -> dict[str, dict[str, list[Any]]]:
    """Charts of the CUSTOM SCALARS tab, which joins those of all runs: loss parts, quality and speed, together."""
    of = re.escape(_of(system))
    main = "|".join(map(re.escape, MAIN_METRICS))
    charts = {
        "Loss": {
            f"loss and its parts ({system})": rf"^train/(?!grad_norm).*{of}$",
            f"gradient norm ({system})": rf"^train/grad_norm{of}$",
        },
        "Quality": {
            "validation": rf"^valid/({main})$",
            "validation, over the percent of each run": rf"^valid_percent/({main})$",
        },
        "Speed": {
            f"users per second ({system})": rf"^work/users_per_second{of}$",
            **({f"LLM tokens per second ({system})": rf"^work/useful_tokens_per_second{of}$"} if with_llm else {}),
            "peak memory, GiB": r"^work/memory_peak",
            "goodput": r"^work/goodput$",
        },
    }
    return {
        category: {title: ["Multiline", [pattern]] for title, pattern in of_category.items()}
        for category, of_category in charts.items()
    }


def percent(step: int, total: int) -> int:
    """How much of a run is done: its percent, or the step of runs of less than 100 steps.

    Never above the step: `purge_step` hides what is above the step that a run resumes from, whatever it counts.
    """
    return step * min(PERCENT, total) // total


def add_items(board: SummaryWriter, item_ND: Tensor, titles: Sequence[str], count_N: Sequence[int], step: int) -> None:
    """Write item vectors for the embedding projector, with titles and the number of training events per item.

    Nothing is written if those of this step exist.

    Letters: N items, D width, X principal components.
    """
    writer: Any = board
    if (Path(writer.log_dir) / f"{step:05d}" / "items").exists():  # where `add_embedding` puts them
        return
    order = sorted(range(len(titles)), key=lambda row: -count_N[row])[:MAX_POINTS]
    vector_ND = item_ND[order].float().cpu()
    if vector_ND.shape[1] > MAX_DIMENSIONS:
        centred_ND = vector_ND - vector_ND.mean(0)
        axis_XD = torch.linalg.svd(centred_ND, full_matrices=False).Vh[:MAX_DIMENSIONS]
        vector_ND = centred_ND @ axis_XD.T
    rows = [[" ".join(titles[row].split()), str(count_N[row])] for row in order]
    writer.add_embedding(
        vector_ND, metadata=rows, metadata_header=["title", "training events"], global_step=step, tag="items"
    )


def add_test(board: SummaryWriter, metrics: Mapping[str, Mapping[str, float]], step: int) -> None:
    """Write test metrics by history order: as scalars, for the columns of HPARAMS, and as a table of both orders."""
    writer: Any = board
    orders = list(metrics)
    names = list(dict.fromkeys(name for of in metrics.values() for name in of))
    for order, of in metrics.items():
        for name, value in of.items():
            writer.add_scalar(f"best/test {name}" + f" {order}" * (order != "original"), value, step)
    lines = [["metric", *orders], ["---", *["---:"] * len(orders)]]
    for name in names:
        lines.append([name, *(f"{metrics[order][name]:.4f}" if name in metrics[order] else "" for order in orders)])
    writer.add_text("test", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)


def _shown(value: object) -> str | float:
    """A setting as TensorBoard accepts it; numbers stay numbers, so that their column sorts numerically."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
