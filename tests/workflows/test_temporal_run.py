"""A run on a dataset with a temporal split: trained, tested and reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import sasrec_config, train_run

from shards.__main__ import main as shards_main
from shards.synthetic import write_world
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.popularity import RECENT_DAYS, popularity_ranks
from trainer.reports.results import read
from trainer.workflows.report import report

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("temporal")
    reviews, catalog = write_world(folder / "raw", users=60, items=40)
    words = f"build {folder / 'data'} --source table --time-unit ms --reviews {reviews} --meta {catalog} --name world"
    words += " --min-item 1 --min-train 3 --negatives 9 --title-negatives 3 --split temporal --quantile 0.7"
    assert shards_main(words.split()) == 0
    train_run(sasrec_config(folder / "data", folder / "run", epochs=2))
    return folder / "run"


def test_users_without_a_later_event_are_not_tested(run: Path) -> None:
    dataset = open_dataset(run.parent / "data", full_check=False)
    [users] = read_in_order(dataset.path, dataset.manifest)
    original, shuffled = read(run / "results.jsonl")
    assert original.users == shuffled.users == int((users.test_item_U > 0).sum()) < len(users)
    assert original.later_training == 0.0
    assert "Jaccard@10" in shuffled.metrics


def test_the_report_has_both_kinds_of_popularity_and_no_warning(run: Path) -> None:
    text = report([run], popularity=True, against=run)
    assert [line.split("  ")[0] for line in text.splitlines() if line.startswith("popularity")] == [
        "popularity",
        "popularity (7 days)",
    ] * 3, "two blocks of metrics, and the differences"
    assert "warning" not in text


def test_recent_popularity_counts_the_last_days_of_training(run: Path) -> None:
    dataset = open_dataset(run.parent / "data", full_check=False)
    [users] = read_in_order(dataset.path, dataset.manifest)
    recent = users.train.time_E > users.train.time_E.max() - RECENT_DAYS * 86_400_000
    assert 0 < recent.sum() < len(recent)
    count_N = np.bincount(users.train.item_E[recent], minlength=dataset.num_items + 1)
    user_U, ranks = popularity_ranks(dataset, "test", "sampled", RECENT_DAYS)
    _, target_U = users.targets("test")
    other_UC = dataset.candidates("retrieval", "test")[user_U]
    assert ranks.greater.tolist() == (count_N[other_UC] > count_N[target_U][:, None]).sum(1).tolist()
