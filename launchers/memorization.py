"""Ask whether a language model knows a catalog by heart: `python launchers/memorization.py LLM --data DIR`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command, show_progress
from trainer.config import LLMConfig
from trainer.runs.model_folder import check_llm_path


def main(arguments: Sequence[str], prog: str = "memorization.py") -> None:
    """Print how many titles the model writes after their raw ids, after those of other items, and after their first
    halves."""
    options = _parse(arguments, prog)
    if options.items < 2:
        raise ValueError(f"--items {options.items}: give at least 2")
    if options.shots < 1:
        raise ValueError(f"--shots {options.shots}: give at least 1")
    check_llm_path(options.llm, "LLM")
    show_progress()

    from trainer.evaluation.memorization import BY_ID
    from trainer.workflows.memorization import memorized

    llm = LLMConfig(path=options.llm, dtype=options.dtype)
    found = memorized(options.data, llm, options.items, shots=options.shots, seed=options.seed)
    shares, knows = found.shares(), found.knows_ids()
    items = len(found.right_I[BY_ID])
    if options.json:
        print(json.dumps({"items": items, "knows_ids": knows} | {name: vars(share) for name, share in shares.items()}))
        return
    print(f"{items} items of {options.data}, {options.shots} shots, {options.llm}")
    for name, share in shares.items():
        print(f"{name:<26} {share.value:7.4f} [{share.low:.4f}, {share.high:.4f}]")
    print(
        "it has seen this catalog with its ids: its results on this dataset may profit from that"
        if knows
        else "no sign that it has seen this catalog with its ids"
    )


def _parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = CommandParser(
        prog=prog, description="Ask whether a language model knows the catalog of a dataset by heart."
    )
    parser.add_argument("llm", metavar="LLM", help="folder or hub id of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--items", type=int, default=500, help="random items to ask about (default 500)")
    parser.add_argument("--shots", type=int, default=5, help="lines of the catalog to show first (default 5)")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the weights (default bfloat16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_process(run_command(main))
