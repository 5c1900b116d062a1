"""Train and evaluate LLM-based sequential recommenders.

usage: llm-srec SUBCOMMAND ...

data:
  shards       turn reviews into a dataset, verify it, describe it
  title-store  compute the LLM's keys and values of all titles once, for many runs

training:
  plan         estimate memory and time of a run before it starts
  train        train a system and test its best checkpoint; started again, it resumes
  compare      train and test several systems, with one table at the end

evaluation:
  evaluate     rank the candidates of a trained run's users
  report       print the results of several runs side by side
  recommend    recommend items to one user

cluster:
  submit       submit a run or a sweep to Slurm

options:
  -h, --help   show this page; `llm-srec SUBCOMMAND --help` lists a subcommand's options
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
    "plan": "launchers.plan",
    "train": "launchers.train",
    "compare": "launchers.compare",
    "evaluate": "launchers.evaluate",
    "report": "launchers.report",
    "recommend": "launchers.recommend",
    "submit": "launchers.slurm.submit",
}
"""Where the `main` of each subcommand is."""


def main() -> NoReturn:
    """Run the subcommand that the command line names, and end the process with its exit code."""
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
    if name == "shards":  # a cancelled Slurm job then removes its unfinished dataset, as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Imported late: help comes at once, and what runs on a login node imports no torch.
    code: int | None = import_module(MODULES[name]).main(words, prog=f"llm-srec {name}")
    return code


if __name__ == "__main__":
    main()
