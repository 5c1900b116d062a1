"""Export a trained run as one folder that stands alone, with a model card; push it to the Hugging Face hub.

llm-srec export RUN OUT                        weights, item vectors by raw id, metrics, a model card
llm-srec export RUN OUT --index exact          and an index for faiss (or hnsw)
llm-srec export RUN OUT --push OWNER/NAME      and push it; --dry-run lists what would be pushed
llm-srec export OUT --push OWNER/NAME          push an export that was made before
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from launchers.command import CommandParser, exit_process, run_command, show_progress
from trainer.runs.exported import is_export
from trainer.runs.preflight import check_loadable
from trainer.workflows.exporting.checks import ExportOptions, IndexKind, check_export
from trainer.workflows.exporting.hub import check_repository, listing, push


def main(arguments: Sequence[str], prog: str = "export.py") -> None:
    """Write the export, then push it."""
    options = _parser(prog).parse_args(arguments)
    show_progress()
    if options.push:
        check_repository(options.push)
    elif options.dry_run or options.public:
        raise ValueError("--dry-run and --public are about --push: add --push OWNER/NAME")
    out = _exported(options)
    if options.push and options.dry_run:
        print(f"would push to {options.push}:")
        print(*(f"  {size:>13,}  {name}" for name, size in listing(out)), sep="\n")
    elif options.push:
        print(f"pushed: {push(out, options.push, private=not options.public)}")


def _exported(options: argparse.Namespace) -> Path:
    """The folder of the export, written now or before."""
    if options.out is None:
        if not is_export(options.run):
            raise ValueError(f"name a folder for the export: llm-srec export {options.run} OUT")
        if not options.push:
            raise ValueError(f"{options.run} is an export already: add --push OWNER/NAME to push it")
        return Path(options.run)
    saved = check_loadable(options.run, options.llm, options.data)
    wanted = ExportOptions(options.index, options.onnx, options.license)
    check_export(saved, options.out, wanted)

    from trainer.workflows.exporting.export import export  # imports torch

    export(saved, options.out, wanted)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 2**20:,.1f} MiB; README.md in it is its model card")
    return Path(options.out)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or an export to push")
    parser.add_argument("out", type=Path, nargs="?", help="new folder for the export")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's dataset, if it has moved")
    parser.add_argument("--llm", metavar="PATH", help="the run's language model or text encoder, if it has moved")
    parser.add_argument("--index", choices=get_args(IndexKind), help="also write index.faiss (extra faiss)")
    parser.add_argument("--onnx", action="store_true", help="also write the user encoder of an ID system (extra onnx)")
    parser.add_argument("--license", metavar="ID", help="licence for the model card, such as apache-2.0")
    parser.add_argument("--push", metavar="OWNER/NAME", help="push to this repository of the hub, made private if new")
    parser.add_argument("--public", action="store_true", help="make the repository public if it is new")
    parser.add_argument("--dry-run", action="store_true", help="list what would be pushed, and push nothing")
    return parser


if __name__ == "__main__":
    exit_process(run_command(main))
