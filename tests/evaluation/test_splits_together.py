"""Several splits in one pass: the same results as one by one, with fewer tokens where prompts share prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers import LLM_SYSTEMS, llm4rec_config
from llm_parts import retrieval_parts

from trainer.config import Candidates, EvaluationConfig, HistoryOrder, parse_config
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Histories, Users
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.protocol import Evaluator
from trainer.evaluation.rankers import SPLITS
from trainer.models import AnySystem, build_system

LONGEST = 9
"""Shorter than some of the training sequences of 5 to 12 items: some prompts are extended, others slide."""


class Bench:
    """Builds systems on the small world."""

    def __init__(self, world: Path, llm: Path, teacher: Path, stage1: Path) -> None:
        self.dataset: Dataset = open_dataset(world, full_check=False)
        self.users: Users = next(read_in_order(world, self.dataset.manifest))
        self._paths = (llm, {"teacher": teacher, "stage1": stage1})

    def build(self, name: str, *, max_history: int = LONGEST, **llm: Any) -> AnySystem:
        tree = llm4rec_config(name, self.dataset.path, Path("unused"), *self._paths)
        tree["system"] |= {"max_history": max_history, "llm": tree["system"]["llm"] | {"max_tokens": 512} | llm}
        torch.manual_seed(0)
        built = build_system(parse_config(tree, "test"), self.dataset)
        built.model.eval()
        return built

    def evaluator(self, system: AnySystem, **settings: Any) -> Evaluator:
        config = EvaluationConfig(batch_size=7, **settings)  # odd, so that some batches split a user's two rows
        return Evaluator(self.dataset, system.scoring, config, World(0, 1, torch.device("cpu")))


@pytest.fixture(scope="module")
def bench(world: Path, tiny_llm: Path, teacher: Path, stage1: Path) -> Bench:
    return Bench(world, tiny_llm, teacher, stage1)


@torch.no_grad()
@pytest.mark.parametrize("name", LLM_SYSTEMS)
@pytest.mark.parametrize("packing", ["stream", "rows"])
def test_vectors_equal_those_of_each_split_alone(bench: Bench, name: str, packing: str) -> None:
    model, collator = retrieval_parts(bench.build(name, packing=packing))
    of_split = [bench.users.targets(split)[0] for split in SPLITS]
    users = len(bench.users)
    by_user = np.arange(2 * users).reshape(2, users).T.flatten()
    together = collator.histories(Histories.concatenate(of_split).take(by_user))
    alone = [collator.histories(histories) for histories in of_split]
    user_2UD = model.user_vectors(together).view(users, 2, -1).transpose(0, 1)
    torch.testing.assert_close(user_2UD, torch.stack([model.user_vectors(b) for b in alone]), rtol=1e-5, atol=1e-5)
    saved = sum(batch.prompts.useful_tokens for batch in alone) - together.prompts.useful_tokens
    short = bench.users.train.length_U < LONGEST
    assert 0 < short.sum() < users
    # Items shown in both splits are run once, except a title's last token, which punctuation may merge with.
    short_histories = of_split[0].take(np.flatnonzero(short))
    prompts = collator._user_prompts(short_histories, np.zeros(len(short_histories), np.int64))
    shown = sum(len(p.token_T) for p in prompts)
    closing = len(collator.writer._behind_title(collator.writer._template.closing)[1]) + 1
    most = shown - closing * int(short.sum())
    if name in ("collm", "a_llmrec"):  # begin with the user's vector, which differs between the splits
        assert saved == 0
    else:
        assert most - 2 * int(short.sum()) <= saved <= most


@pytest.mark.parametrize("candidates", get_args(Candidates))
def test_ranks_equal_those_of_each_split_alone(bench: Bench, candidates: Candidates) -> None:
    ranking = bench.evaluator(bench.build("llm_srec"), candidates=candidates).at_current_weights()
    histories: tuple[HistoryOrder, ...] = get_args(HistoryOrder)
    for history in histories:
        found = ranking.evaluate_together(["test", "valid"], history)
        assert list(found) == ["test", "valid"]
        tokens = 0
        for split, together in found.items():
            alone = ranking.evaluate(split, history)
            for column in ("greater", "ties", "candidates"):
                assert getattr(together.ranks, column).tolist() == getattr(alone.ranks, column).tolist()
            tokens += alone.tokens
        spent = sum(together.tokens for together in found.values())
        # A shuffled test history extends the shuffled valid history only if its latest item happens to come last.
        least, most = (0.0, 0.9) if history == "original" else (0.95, 1.0)
        assert least < spent / tokens < most


def test_sliding_windows_save_no_tokens(bench: Bench) -> None:
    """Every user has more items than a prompt shows, so the windows of the two splits start at different items."""
    ranking = bench.evaluator(bench.build("llm_srec", max_history=5), users=20).at_current_weights()
    found = ranking.evaluate_together(["valid", "test"])
    alone = [ranking.evaluate(split).tokens for split in SPLITS]
    assert sum(evaluation.tokens for evaluation in found.values()) == pytest.approx(sum(alone), abs=1)
    assert [len(evaluation.ranks) for evaluation in found.values()] == [20, 20]
