"""`evaluate.py`, `recommend.py` and `report.py`, run as commands on trained runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import build_world, run_command
from launch_helpers import Main, Refused, Trained, contents, one_error

from launchers import audit, evaluate, recommend, report
from trainer.evaluation.ranking import METRIC_NAMES
from trainer.reports.results import FORMAT_VERSION, read

pytestmark = pytest.mark.process


@pytest.fixture
def run(srec: Trained, tmp_path: Path) -> Path:
    """A copy of the trained run: a run folder that was moved."""
    return Path(shutil.copytree(srec.output, tmp_path / "moved"))


def answer(capfd: pytest.CaptureFixture[str], main: Main, *words: str | Path) -> str:
    capfd.readouterr()
    main([str(word) for word in words])
    return capfd.readouterr().out


# ---------------------------------------------------------------------------------------------- evaluate


def test_evaluation_repeats_the_test_of_the_training(run: Path) -> None:
    of_training, _ = read(run / "results.jsonl")
    done = run_command("launchers/evaluate.py", run, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    again = read(run / "results.jsonl")
    assert len(again) == 3
    assert {"version": FORMAT_VERSION, **printed} == json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    assert again[-1].metrics == of_training.metrics
    assert {name: e["value"] for name, e in printed["metrics"].items()} == {
        name: e.value for name, e in of_training.metrics.items()
    }
    for name in (
        "system",
        "dataset_fingerprint",
        "config_hash",
        "split",
        "history",
        "candidates",
        "step",
        "users",
        "tokens",
    ):
        assert printed[name] == getattr(of_training, name), name
    assert printed["run"] == "moved"


def test_other_splits_histories_and_candidates(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, shuffled_of_training = read(run / "results.jsonl")
    best = next(
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "valid/MRR" in record and record["step"] == shuffled_of_training.step
    )

    shuffled = json.loads(answer(capfd, evaluate.main, run, "--shuffle-history", "--json"))
    assert shuffled["history"] == "shuffled"
    assert shuffled["metrics"]["MRR"]["value"] == shuffled_of_training.metrics["MRR"].value
    assert 0 <= shuffled["metrics"]["Jaccard@10"]["value"] == shuffled_of_training.metrics["Jaccard@10"].value < 1

    valid = json.loads(answer(capfd, evaluate.main, run, "--split", "valid", "--json"))
    assert valid["split"] == "valid"
    for name in METRIC_NAMES:
        assert valid["metrics"][name]["value"] == pytest.approx(best[f"valid/{name}"]), name
    assert valid["metrics"].keys() - set(METRIC_NAMES) == {"ARP@10", "APLT@10", "MIUF@10"}
    assert 0 < valid["totals"]["coverage@10"] <= 1
    assert 0 < valid["later_training"] < 1

    full = json.loads(answer(capfd, evaluate.main, run, "--candidates", "full", "--json"))
    assert full["candidates"] == "full"
    assert full["num_candidates"] is None  # all items but the user's own, so it differs between users
    assert full["metrics"]["HR@20"]["value"] < 1.0  # more candidates than the 20 sampled ones

    both = [json.loads(x) for x in answer(capfd, evaluate.main, run, "--split", "valid", "test", "--json").splitlines()]
    assert [result["split"] for result in both] == ["valid", "test"]
    assert both[0]["metrics"] == valid["metrics"]

    seen = json.loads(answer(capfd, evaluate.main, run, "--candidates", "full_with_seen", "--json"))
    assert seen["num_candidates"] is not None, "all items, the same number for everyone"
    assert seen["metrics"]["MRR"]["value"] < full["metrics"]["MRR"]["value"], "seen items stand above the target too"

    table = answer(capfd, evaluate.main, run, "--users", "10", "--split", "valid", "test")
    assert "coverage@10" in table
    assert "--split temporal" in table
    assert "world · valid split · 20 sampled candidates" in table
    assert "world · test split · 20 sampled candidates" in table
    assert "llm_srec" in table
    assert [r.users for r in read(run / "results.jsonl")] == [61] * 8  # a sample is not recorded


def test_a_report_pairs_runs_user_by_user(srec: Trained, teacher: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = answer(capfd, report.main, srec.output, teacher, "--popularity", "--against", srec.output)
    table, paired = printed.split("minus that of each other run")
    assert [line.split()[0] for line in table.splitlines() if line][3:6] == ["popularity", "llm_srec", "sasrec"]
    names = [line.split()[0] for line in paired.splitlines()[2:4]]
    assert names == ["popularity", teacher.name]
    assert [r.extensions for r in read(srec.output / "results.jsonl")] == [(), ()]


def test_a_report_against_another_run(srec: Trained, teacher: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(srec.output), "--against", str(teacher)]) == 2
    assert f"--against {teacher} is not among the runs to report: add it" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- recommend


def test_recommendations_are_new_to_the_user_and_ordered(srec: Trained, world: Path) -> None:
    reviews = pl.read_parquet(world.parent / "raw/reviews.parquet").filter(pl.col("user") == "u7").sort("time")
    titles = dict(pl.read_parquet(world.parent / "raw/items.parquet").select("item", "title").iter_rows())
    owned = [titles[item] for item in reviews["item"]]
    before = contents(srec.output)
    done = run_command("launchers/recommend.py", srec.output, "--user", "u7", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert contents(srec.output) == before
    got: dict[str, Any] = json.loads(done.stdout)
    assert got["user_id"] == "u7"
    assert [entry["title"] for entry in got["history"]] == owned[-5:]  # max_history=5
    assert [entry["rank"] for entry in got["recommendations"]] == list(range(1, 11))
    recommended = [entry["title"] for entry in got["recommendations"]]
    assert [titles[entry["item_id"]] for entry in got["recommendations"]] == recommended
    assert len(set(recommended)) == 10
    assert set(recommended) <= set(titles.values()) - set(owned)
    scores = [entry["score"] for entry in got["recommendations"]]
    assert scores == sorted(scores, reverse=True)


def test_recommendations_as_text(teacher: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = answer(capfd, recommend.main, teacher, "--user", "u3", "--top", "3").splitlines()
    got = json.loads(answer(capfd, recommend.main, teacher, "--user", "u3", "--top", "3", "--json"))
    assert lines[0] == "user u3, latest items:"
    assert lines[1:6] == [f"      {entry['date']}  {entry['title']}" for entry in got["history"][-5:]]
    assert lines[6] == "recommended:"
    rows = [(e["rank"], e["score"], e["item_id"], e["title"]) for e in got["recommendations"]]
    assert lines[7:] == [f"  {rank:>2}  {score:9.4f}  {item:<3}  {title}" for rank, score, item, title in rows]
    assert len(lines) == 10


def test_at_most_the_items_that_are_left_are_recommended(teacher: Path, capfd: pytest.CaptureFixture[str]) -> None:
    got = json.loads(answer(capfd, recommend.main, teacher, "--user", "u3", "--top", "999", "--json"))
    own = {entry["title"] for entry in got["history"]}  # SASRec reads up to 12, of at most 14
    assert 40 - 14 <= len(got["recommendations"]) <= 40 - len(own)


# ---------------------------------------------------------------------------------------------- report


def test_report_on_two_runs(srec: Trained, teacher: Path) -> None:
    done = run_command("launchers/report.py", teacher, srec.output)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == srec.stdout.strip()  # training prints the same table


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("command", ["evaluate", "recommend", "report"])
def test_a_folder_that_is_not_a_run(tmp_path: Path, command: str) -> None:
    user = ["--user", "u1"] if command == "recommend" else []
    done = run_command(f"launchers/{command}.py", tmp_path / "nothing", *user)
    error = one_error(done.returncode, done.stdout, done.stderr)
    assert str(tmp_path / "nothing") in error
    assert ("does not exist: write it with" if command == "report" else "is not a run folder (no config.yaml") in error
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("main", [evaluate.main, recommend.main], ids=["evaluate", "recommend"])
def test_runs_that_cannot_be_used(refused: Refused, run: Path, main: Main, tmp_path: Path) -> None:
    words: list[str | Path] = [run, "--user", "u1"] if main is recommend.main else [run]
    other = build_world(tmp_path / "other", users=61, seed=9)
    config = (run / "config.yaml").read_text()
    data = next(line for line in config.splitlines() if line.startswith("  path: ")).split()[1]
    (run / "config.yaml").write_text(config.replace(data, str(other)))
    before = contents(run)
    assert f"{run} was trained on a different dataset than {other} holds now" in refused(main, *words)
    assert contents(run) == before

    (run / "config.yaml").write_text(config)
    for weights in run.glob("checkpoints/step-*/weights.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-4])
    assert "weights.safetensors is damaged" in refused(main, *words)
    (run / "checkpoints/best.json").unlink()
    assert f"{run} has no best checkpoint yet: let it train until its first validation" in refused(main, *words)


def test_unknown_users_and_impossible_numbers(refused: Refused, teacher: Path, world: Path) -> None:
    before = contents(teacher)
    error = refused(recommend.main, teacher, "--user", "nobody")
    assert f"user 'nobody' is not in {world}" in error
    assert "users.parquet lists the users" in error
    assert "--top 0: ask for at least 1 item" in refused(recommend.main, teacher, "--user", "u1", "--top", "0")
    assert "--users 0: give the number of users to sample" in refused(evaluate.main, teacher, "--users", "0")
    assert contents(teacher) == before


# ---------------------------------------------------------------------------------------------- audit


def test_runs_of_different_systems_are_no_pair(srec: Trained, teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"is a run of llm_srec, but .* of sasrec"):
        audit.main([str(teacher), "--trained-shuffled", str(srec.output)])


def test_a_run_is_audited_with_the_evaluations_metrics(teacher: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capfd, audit.main, teacher, "--json"))
    full = json.loads(answer(capfd, evaluate.main, teacher, "--candidates", "full", "--users", "1000", "--json"))
    before = next(change for change in found["inference"] if change["metric"] == "NDCG@10")
    assert before["before"] == pytest.approx(full["metrics"]["NDCG@10"]), "the evaluation's own metric and interval"
    assert {change["group"] for change in found["inference"]} >= {"all users", "frequent transitions", "warm targets"}
    assert found["training"] == []
    twice = answer(capfd, audit.main, teacher, "--trained-shuffled", teacher)
    assert "trained on shuffled" in twice
    assert "+0.0 %" in twice, "the same run: no change"
