"""A run on a dataset with a temporal split: trained, tested and reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import sasrec_config, train_run

from shards.__main__ import main as shards_main
from shards.synthetic import write_world
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import epoch_batches, read_in_order
from trainer.evaluation.order.user_groups import popularity_groups, transition_groups
from trainer.evaluation.popularity import RECENT_DAYS, popularity_ranks
from trainer.evaluation.ranking import per_user_metrics
from trainer.reports.results import read
from trainer.reports.user_ranks import read_ranks
from trainer.workflows.report import report

pytestmark = pytest.mark.process


def trained(folder: Path, options: str = "") -> Path:
    """A run on a dataset that is split at a point in time."""
    reviews, catalog = write_world(folder / "raw", users=60, items=40)
    words = f"build {folder / 'data'} --source table --time-unit ms --reviews {reviews} --meta {catalog} --name world"
    words += " --min-item 1 --min-train 3 --negatives 9 --title-negatives 3 --split temporal --quantile 0.7"
    assert shards_main([*words.split(), *options.split()]) == 0
    train_run(sasrec_config(folder / "data", folder / "run", epochs=2))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("temporal"))


@pytest.fixture(scope="module")
def successive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who only validate, and several test targets per user."""
    options = "--target successive --validation by-user --validation-users 12"
    return trained(tmp_path_factory.mktemp("successive"), options)


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


def test_users_who_validate_are_not_trained_on(successive: Path) -> None:
    dataset = open_dataset(successive.parent / "data", full_check=False)
    manifest = dataset.manifest
    [users] = read_in_order(dataset.path, manifest)
    only_valid = users.valid_item_U > 0
    assert only_valid.sum() == 12 == manifest.num_users - manifest.num_trained
    batches = epoch_batches(dataset.path, manifest, batch_size=8, shuffle_shards=1, seed=0, epoch=0)
    seen_U = np.concatenate([batch.train.user_U for batch in batches])
    assert sorted(seen_U) == np.flatnonzero(~only_valid).tolist()
    rest = list(epoch_batches(dataset.path, manifest, batch_size=8, shuffle_shards=1, seed=0, epoch=0, first_step=2))
    assert np.concatenate([batch.train.user_U for batch in rest]).tolist() == seen_U[16:].tolist(), "resumed"
    lines = [json.loads(line) for line in (successive / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2 * -(-len(seen_U) // 20), "two epochs of the users who train"


def test_a_user_with_several_targets_counts_once(successive: Path) -> None:
    dataset = open_dataset(successive.parent / "data", full_check=False)
    [users] = read_in_order(dataset.path, dataset.manifest)
    histories, target_T = users.targets("test")
    for result in read(successive / "results.jsonl"):
        found = read_ranks(successive, result)
        assert found.user_T.tolist() == histories.user_U.tolist()
        assert result.users == len(found.user_U) == dataset.manifest.statistics.users_with_test < len(target_T)
        ndcg_T = per_user_metrics(found.ranks, tie=result.tie)["NDCG@10"]
        of_users = [ndcg_T[found.user_T == user].mean() for user in found.user_U]
        assert result.metrics["NDCG@10"].value == pytest.approx(np.mean(of_users), rel=1e-12)
    assert "Jaccard@10" in result.metrics
    text = report([successive], popularity=True, against=successive)
    assert "popularity (7 days)" in text
    assert set(transition_groups(dataset, "test")) == {"Transition", "Non-Transition"}
    with pytest.raises(ValueError, match="another --target"):
        popularity_groups(dataset, "test")
