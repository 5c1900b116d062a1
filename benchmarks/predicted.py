"""Predict step times and peak memory of the five LLM systems on devices that this project has not run on.

    python -m benchmarks.predicted            prints the tables
    python -m benchmarks.predicted --write    writes them into predicted.md

They are those of `launchers/plan.py`, for one device and 20 users per step of the dataset of `benchmarks.first_gpu`, so
that whoever has such a device can compare.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.gpu_checks import TEXTS
from benchmarks.common.random_llm import write_tokenizer
from benchmarks.common.setting import LLMS
from benchmarks.first_gpu import write_dataset
from trainer.config import load_config
from trainer.planner.devices import DeviceKind
from trainer.planner.forecast import Option
from trainer.planner.plan import plan_run

PAGE = Path(__file__).with_name("predicted.md")
BEGIN, END = "<!-- python -m benchmarks.predicted --write -->\n", "<!-- end -->\n"
SYSTEMS = {"TALLRec": "tallrec", "LLaRA": "llara", "CoLLM": "collm", "A-LLMRec": "a_llmrec", "LLM-SRec": "llm_srec"}
DEVICES: dict[str, DeviceKind] = {"A6000": "a6000", "H100": "h100", "H200": "h200", "Gaudi 2": "gaudi2"}
SIZES = ("Llama-3.2-3B", "Llama-3.1-8B")
_USERS = 20


@dataclass(frozen=True)
class Predictor:
    """Plans of runs whose dataset and LLMs are in `folder`."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Predictor:
        """Write the dataset, and of the LLMs the tokenizer and the shape."""
        write_dataset(folder)
        for name in SIZES:
            write_tokenizer(folder / name, TEXTS, vocabulary=1000)
            (folder / name / "config.json").write_text(json.dumps(LLMS[name]))
        return cls(folder)

    def option(self, system: str, llm: str, device: str) -> Option | None:
        """The settings of the fastest step on one device; None: it does not fit."""
        kind = DEVICES[device]
        words = [
            f"output={self.folder / 'run'}", f"data.path={self.folder / 'data'}", "data.verify=false",
            f"system.llm.path={self.folder / llm}", f"train.batch_size={_USERS}",
            f"system.llm.packing={'rows' if kind == 'gaudi2' else 'stream'}",
        ]  # fmt: skip
        return plan_run(load_config(Path(SYSTEMS[system]), words), kind, 1).forecast.recommended

    def row(self, system: str, llm: str) -> str:
        """A row of the table."""
        options = [self.option(system, llm, device) for device in DEVICES]
        return f"| {' | '.join([llm.rpartition('-')[2], system, *(_cell(option) for option in options)])} |"


def table(predictor: Predictor) -> str:
    """All rows, as Markdown."""
    head = ["LLM", "system", *(f"{device}: s, GB" for device in DEVICES)]
    rule = ["---", "---", *(["---:"] * len(DEVICES))]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, rule)]
    return "\n".join([*lines, *(predictor.row(system, llm) for llm in SIZES for system in SYSTEMS)])


def _cell(option: Option | None) -> str:
    if option is None:
        return "does not fit"
    how = [f"{option.micro_batches} parts"] if option.micro_batches > 1 else []
    how += ["recomputing"] if option.recompute else []
    figures = f"{option.step_seconds:.2f}, {option.bytes.total / 1e9:.1f}"
    return figures + (f" ({', '.join(how)})" if how else "")


def page_with(text: str, new: str) -> str:
    """The page `text` with its table replaced by `new`."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{new}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(prog="benchmarks.predicted", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name} instead of printing it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="predicted-") as folder:
        found = table(Predictor.write(Path(folder)))
    if options.write:
        PAGE.write_text(page_with(PAGE.read_text(), found))
    else:
        print(found)


if __name__ == "__main__":
    main()
