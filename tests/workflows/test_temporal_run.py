"""A run on a dataset with a temporal split: trained, tested and reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import sasrec_config, train_run

from shards.__main__ import main as shards_main
from shards.statistics import stats_text
from shards.synthetic import write_world
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import epoch_batches, read_in_order
from trainer.evaluation.order.user_groups import popularity_groups, transition_groups, transition_scores
from trainer.evaluation.popularity import RECENT_DAYS, popularity_ranks
from trainer.evaluation.ranking import metrics_per_target
from trainer.reports.results import read
from trainer.reports.user_ranks import read_ranks
from trainer.workflows.answers import questions
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
    assert only_valid.sum() == 12 == manifest.num_users - manifest.num_train_users
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
        ndcg_T = metrics_per_target(found.ranks, tie=result.tie)["NDCG@10"]
        of_users = [ndcg_T[found.user_T == user].mean() for user in found.user_U]
        assert result.metrics["NDCG@10"].value == pytest.approx(np.mean(of_users), rel=1e-12)
        assert result.totals["targets"] == len(target_T)
        assert result.totals["NDCG@10 over targets"] == pytest.approx(ndcg_T.mean())
        last = found.last_targets()
        assert last.user_T.tolist() == found.user_U.tolist()
        assert last.ranks.greater[0] == found.ranks.greater[(found.user_T == found.user_U[0]).sum() - 1]
    assert "Jaccard@10" in result.metrics
    text = report([successive], popularity=True, against=successive)
    assert "popularity (7 days)" in text
    groups = transition_groups(dataset, "valid")
    assert len(groups["Transition"]) == len(groups["Non-Transition"]) == 6
    score_U = transition_scores(users.sequences(), users.train, dataset.num_items)
    assert (score_U[users.valid_item_U > 0] > 0).any(), "users who only validate have scores"
    asked = questions(dataset, "test", "sampled", found.user_U[:3])
    assert asked.target_B.tolist() == users.test_item_U[found.user_U[:3]].tolist(), "cases show the last target"
    with pytest.raises(ValueError, match="another --target"):
        popularity_groups(dataset, "test")


def test_blocks_of_users_have_all_targets(successive: Path) -> None:
    dataset = open_dataset(successive.parent / "data", full_check=False)
    [users] = read_in_order(dataset.path, dataset.manifest)
    histories, target_T = users.targets("test")
    blocks = list(users.in_blocks(200))
    found = [block.targets("test") for block in blocks]
    assert len(blocks) > 5
    assert sum(len(block) for block in blocks) == len(users)
    assert np.concatenate([target for _, target in found]).tolist() == target_T.tolist()
    assert np.concatenate([each.item_E for each, _ in found]).tolist() == histories.item_E.tolist()
    assert max(len(each.item_E) for each, _ in found) <= 200


def test_a_sample_has_users_with_targets(successive: Path) -> None:
    manifest = open_dataset(successive.parent / "data", full_check=False).manifest
    assert manifest.sample_size(6, "valid") == manifest.num_users // 2
    assert manifest.num_targets("valid") == 12
    assert manifest.num_targets("test") > manifest.statistics.users_with_test
    assert "not trained on" in stats_text(manifest)
