"""Train and evaluate LLM-based sequential recommenders.

usage: llm-srec SUBCOMMAND ...

data:
  shards       build a dataset from reviews, verify it, show its statistics
  title-store  compute the prefix cache (KV cache of all titles) once, for many runs
  convert-gguf make a GGUF file a folder that system.llm.path takes

training:
  plan         estimate memory and time of a run before it starts
  train        train a system and test its best checkpoint; run again to resume
  compare      train and test several systems, and print one table
  experiment   run a table or figure of the paper

evaluation:
  evaluate     evaluate the best checkpoint of a trained run
  report       print the results of several runs side by side
  audit        measure how much a run, or any other model, depends on order
  memorization ask whether a language model knows a catalog by heart
  recommend    recommend items to users, or after any history
  page         write one HTML page about runs: tables, curves, cases, hashes

use elsewhere:
  export       write a run to one folder that stands alone, and push it to the hub
  serve        recommend over HTTP, with a page to try it

cluster:
  submit       submit a run or a sweep to Slurm

options:
  -h, --help   show this help; `llm-srec SUBCOMMAND --help` lists the options of a subcommand
  --version    show the version

examples:
  llm-srec shards demo data/ml-100k
  llm-srec train sasrec data.path=data/ml-100k output=runs/sasrec
  llm-srec evaluate runs/sasrec --candidates full

on several ranks:
  deepspeed --module launchers.train llm_srec data.path=data/ml-100k ...
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Final, NoReturn

from launchers.command import exit_process, run_command

MODULES: Final = {
    "shards": "shards.__main__",
    "title-store": "launchers.title_store",
    "convert-gguf": "launchers.convert_gguf",
    "plan": "launchers.plan",
    "train": "launchers.train",
    "compare": "launchers.compare",
    "experiment": "launchers.experiment",
    "evaluate": "launchers.evaluate",
    "report": "launchers.report",
    "audit": "launchers.audit",
    "memorization": "launchers.memorization",
    "recommend": "launchers.recommend",
    "page": "launchers.page",
    "export": "launchers.export",
    "serve": "launchers.serve",
    "submit": "launchers.slurm.submit",
}
"""Module with the `main` of each subcommand."""


def main() -> NoReturn:
    """Run the subcommand named on the command line, and exit with its exit code."""
    exit_process(run_command(_run))


def _run(arguments: Sequence[str]) -> int | None:
    name, *words = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, end="")
        return 0
    if name == "--version":
        print(f"llm-srec {version('llm-srec-trainer')}")
        return 0
    if name not in MODULES:
        close = difflib.get_close_matches(name, MODULES, n=1)
        cure = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(MODULES)}"
        raise ValueError(f"unknown subcommand '{name}' ({cure})")
    if name == "shards":  # so that a cancelled Slurm job removes its unfinished dataset, as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Imported late, so that help is instant and commands for login nodes import no torch.
    code: int | None = import_module(MODULES[name]).main(words, prog=f"llm-srec {name}")
    return code


if __name__ == "__main__":
    main()
