"""Recommend items to a user of the dataset: `python launchers/recommend.py RUN --user ID [--top 10] [--json]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.command import leave, run_command
from trainer.config import LLM4RecConfig
from trainer.runs.preflight import checked_run


def main(arguments: Sequence[str]) -> None:
    """Read the user's whole history and print the best items that are not in it."""
    parser = argparse.ArgumentParser(prog="recommend.py", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--user", required=True, help="the user's id in the reviews")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise ValueError(f"--top {options.top}: ask for at least 1 item")
    answer = recommend(options.run, options.user, options.top)
    print(json.dumps(answer, ensure_ascii=False, indent=1) if options.json else _as_text(answer))


def recommend(run: Path, raw_user: str, top: int) -> dict[str, Any]:
    """The user's latest items and the `top` items with the highest scores, as plain values.

    Raises:
        ValueError: unknown user, or a run that cannot be opened.
    """
    from trainer.data.reading.dataset import open_dataset

    config, _ = checked_run(run)
    if config.task == "generation" and isinstance(config.system, LLM4RecConfig):
        raise ValueError(f"{run} chooses among titles that it is given: recommend with a run of task=retrieval")
    user = open_dataset(config.data.path, full_check=False).user_number(raw_user)

    import numpy as np
    import torch

    from trainer.data.collators.base import to_device
    from trainer.data.collators.generation import TitleCollator
    from trainer.data.reading.shards import read_user
    from trainer.distributed import start, stop
    from trainer.workflows.load_run import open_run

    world = start()
    try:
        trained = open_run(run, world)
        evaluator = trained.evaluator
        dataset = evaluator.dataset
        history = read_user(dataset.path, dataset.manifest, user)
        with torch.no_grad():
            item_ND = evaluator.encode_with(trained.model.item_vectors)
            assert not isinstance(evaluator.collator, TitleCollator)
            batch = to_device(evaluator.collator.histories(history), world.device)
            score_N = (item_ND @ trained.model.user_vectors(batch)[0].float()).cpu().numpy()
    finally:
        stop()
    score_N[np.unique(history.item_E) - 1] = -np.inf
    best = np.argsort(-score_N, kind="stable")[:top]
    best = best[np.isfinite(score_N[best])]
    shown = history.last(evaluator.collator.max_history)
    days = shown.time_E.astype("datetime64[ms]").astype("datetime64[D]").astype(str)
    return {
        "user": raw_user,
        "history": [
            {"date": str(day), "title": dataset.titles[item - 1]} for item, day in zip(shown.item_E, days, strict=True)
        ],
        "recommendations": [
            {
                "rank": rank,
                "item": int(row) + 1,
                "title": dataset.titles[row],
                "score": round(float(score_N[row]), 4),
            }
            for rank, row in enumerate(best, 1)
        ],
    }


def _as_text(answer: dict[str, Any]) -> str:
    lines = [f"user {answer['user']}, latest items:"]
    lines += [f"      {entry['date']}  {entry['title']}" for entry in answer["history"][-5:]]
    lines.append("recommended:")
    lines += [f"  {entry['rank']:>2}  {entry['score']:9.4f}  {entry['title']}" for entry in answer["recommendations"]]
    return "\n".join(lines)


if __name__ == "__main__":
    leave(run_command(main))
