"""Means over seeds, from results written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from helpers import sasrec_config
from report_helpers import result

from trainer.config import parse_config
from trainer.reports.seeds import SeedRun, group_seeds, seed_table


def seed_run(test: float, valid: float | None, seed: int = 0, lr: float = 1e-3) -> SeedRun:
    config = parse_config(sasrec_config(Path("data"), Path(f"runs/{lr}/{seed}"), lr=lr) | {"seed": seed}, "test")
    return SeedRun("sasrec", config, valid, result(test), result(test / 2, history="shuffled"))


def test_runs_are_grouped_by_all_but_the_seed() -> None:
    runs = [seed_run(0.5, 0.6, seed, lr) for lr in (1e-3, 1e-2) for seed in (0, 1)]
    groups = [[(run.config.train.lr, run.config.seed) for run in group] for group in group_seeds(runs)]
    assert groups == [[(1e-3, 0), (1e-3, 1)], [(1e-2, 0), (1e-2, 1)]]


def test_runs_of_one_seed_are_not_repetitions() -> None:
    """Students of two teachers have the same settings but for the folder of the teacher."""
    runs = [seed_run(0.5, 0.6), seed_run(0.3, 0.4), seed_run(0.2, 0.3, seed=1)]
    assert [len(group) for group in group_seeds(runs)] == [1, 1, 1]
    assert "sd 0" not in seed_table(runs)


def test_runs_chosen_by_different_metrics_share_no_heading() -> None:
    first, second = seed_run(0.2, 0.5), seed_run(0.4, 0.7, lr=1e-2)
    train = second.config.train.model_copy(update={"metric": "HR@10"})
    other = replace(second, config=second.config.model_copy(update={"train": train}))
    assert "valid, by train.metric" in seed_table([first, other]).splitlines()[0]


def test_the_best_settings_are_those_on_the_validation_items() -> None:
    """By hand: the standard deviation of 0.2 and 0.4 is 0.2 / sqrt(2) = 0.1414; HR@10 is twice NDCG@10."""
    runs = [seed_run(0.2, 0.5), seed_run(0.4, 0.7, seed=1), seed_run(0.45, 0.4, lr=1e-2), seed_run(0.45, 0.4, 1, 1e-2)]
    assert seed_table(runs, "markdown") == (
        "| system | settings | seeds | valid NDCG@10 | NDCG@10 | HR@10 | NDCG@10 shuffled |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| sasrec | train.lr=0.001 (best) | 2 | 0.6000 (sd 0.1414) | 0.3000 (sd 0.1414) | 0.6000 (sd 0.2828) "
        "| 0.1500 (sd 0.0707) |\n"
        "| sasrec | train.lr=0.01 | 2 | 0.4000 (sd 0.0000) | 0.4500 (sd 0.0000) | 0.9000 (sd 0.0000) "
        "| 0.2250 (sd 0.0000) |\n\n"
        "Means over seeds (sd: standard deviation). best: by the validation metric.\n"
    )
    text = seed_table(runs[:1])
    assert text.splitlines()[1].split() == ["sasrec", "1", "0.5000", "0.2000", "0.4000", "0.1000"]
    assert "best" not in text
    assert "(best)" not in seed_table([seed_run(0.2, None), seed_run(0.4, 0.3, lr=1e-2)])
