"""Time one validation: every item encoded once, against the candidates of each user encoded for that user.

    python -m benchmarks.evaluation [--layers 30] [--users 100] [--one-by-one 4]

Same model, users and stored candidates. All items are encoded; users are sampled, and their seconds are scaled to all
users. The users that are run both ways must get the same ranks.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.setting import PRESET, add_arguments, overrides
from trainer.config import load_config
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.protocol import Evaluator, Ranking
from trainer.evaluation.rankers import StoredCandidates, VectorRanker
from trainer.evaluation.ranking import Ranks, concatenate, rank_candidates
from trainer.models import AnySystem, build_system

CPU = torch.device("cpu")


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    config = load_config(PRESET, [*overrides(options), f"evaluation.users={options.users}", "evaluation.batch_size=32"])
    dataset = open_dataset(config.data.path, full_check=False)
    system = build_system(config, dataset)
    system.model.eval()
    evaluator = Evaluator(dataset, system.scoring, config.evaluation, World(0, 1, CPU))

    everyone = dataset.manifest.num_users
    start = time.perf_counter()
    item_ND = evaluator.batches.encode_catalog(dataset.num_items, system.vectors.item_vectors)
    item_seconds = time.perf_counter() - start
    start = time.perf_counter()
    ranks = Ranking(
        evaluator, VectorRanker(system.vectors, StoredCandidates(dataset, "retrieval"), "sampled", CPU, item_ND)
    )
    evaluated = len(ranks.evaluate("valid").ranks)
    user_seconds = (time.perf_counter() - start) / evaluated * everyone

    start = time.perf_counter()
    alone = _ranks(system, dataset, options.one_by_one, None)
    apart = (time.perf_counter() - start) / options.one_by_one * everyone
    shared = _ranks(system, dataset, options.one_by_one, item_ND)
    once = item_seconds + user_seconds
    result = {
        "machine": describe(),
        "llm": str(options.llm),
        "layers": options.layers,
        "users": everyone,
        "items": dataset.num_items,
        "users_timed": evaluated,
        "users_timed_with_own_candidates": options.one_by_one,
        "seconds_items": round(item_seconds, 2),
        "seconds_users": round(user_seconds, 2),
        "seconds_items_once": round(once, 2),
        "seconds_own_candidates": round(apart, 1),
        "times_as_fast": round(apart / once, 1),
        "same_ranks": bool(np.array_equal(alone.greater, shared.greater)),
    }
    write(options.out, result)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):34} {value}")


@torch.no_grad()
def _ranks(system: AnySystem, dataset: Dataset, count: int, item_ND: Tensor | None) -> Ranks:
    """Ranks of the first `count` users, one at a time.

    Args:
        item_ND: vectors of all items; None encodes the candidates of each user for that user.
    """
    scoring = system.vectors
    histories, target_U = next(read_in_order(dataset.path, dataset.manifest)).targets("valid")
    candidates_UC = dataset.candidates("retrieval", "valid")
    parts = []
    for row in range(count):
        user = histories.take(slice(row, row + 1))
        item_C = np.concatenate([target_U[row : row + 1], candidates_UC[user.user_U[0]]])
        user_1D = scoring.user_vectors(user, CPU).vector_BD
        item_CD = scoring.item_vectors(item_C, CPU) if item_ND is None else item_ND[item_C - 1]
        parts.append(rank_candidates(user_1D @ item_CD.T))
    return concatenate(parts)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.evaluation", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--users", type=int, default=100, help="users timed with items encoded once")
    parser.add_argument("--one-by-one", type=int, default=4, help="users timed with their own candidates encoded")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
