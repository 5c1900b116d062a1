"""`recommend.py` for users, typed histories and files, on trained runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from launch_helpers import Main, Refused, Trained, contents

from launchers import recommend

pytestmark = pytest.mark.process


def answers(capfd: pytest.CaptureFixture[str], *words: str | Path) -> list[dict[str, Any]]:
    capfd.readouterr()
    recommend.main([*map(str, words), "--json"])
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def ids(answer: dict[str, Any], key: str = "recommendations") -> list[str]:
    return [entry["item_id"] for entry in answer[key]]


def test_everyone_is_answered_like_alone(teacher: Path, world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    everyone = answers(capfd, teacher, "--all")
    users = pl.read_parquet(world / "users.parquet").sort("user")["raw_id"].to_list()
    assert [answer["user_id"] for answer in everyone] == users
    by_user = {answer["user_id"]: answer for answer in everyone}
    assert answers(capfd, teacher, "--user", "u9", "u3", "u9") == [by_user[user] for user in ("u9", "u3", "u9")]


def test_a_typed_history_equals_that_of_the_user(
    srec: Trained, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ids or titles, from the command line, stdin or a file; the dates are shown to the LLM."""
    reviews = pl.read_parquet(world.parent / "raw/reviews.parquet").filter(pl.col("user") == "u7").sort("time")
    items, times = reviews["item"].to_list(), [str(time) for time in reviews["time"]]
    [known] = answers(capfd, srec.output, "--user", "u7")
    typed = ["--history", *items, "--times", *times]
    [same] = answers(capfd, srec.output, *typed)
    assert same == known | {"user_id": None}
    titles = dict(pl.read_parquet(world.parent / "raw/items.parquet").select("item", "title").iter_rows())
    file = tmp_path / "histories.jsonl"
    line = {"history": [titles[item].upper() for item in items], "times": times, "user_id": "u7"}
    file.write_text(f"{json.dumps(line)}\n{json.dumps(items)}\n")
    by_title, undated = answers(capfd, srec.output, "--histories", file)
    assert [ids(by_title), ids(by_title, "history")] == [ids(known), ids(known, "history")]
    assert [e["score"] for e in by_title["recommendations"]] == pytest.approx(
        [e["score"] for e in known["recommendations"]], abs=2e-3
    )
    assert {entry["date"] for entry in undated["history"]} == {None}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(items).encode())))
    [piped] = answers(capfd, srec.output, "--history", "-")
    assert ids(piped, "history") == ids(undated, "history")


def test_candidates_and_seen_items(teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "candidates.txt"
    file.write_text("i3\ni1\ni2\ni3\n")
    history: list[str | Path] = ["--history", "i1", "i9", "--candidates", file]
    [new] = answers(capfd, teacher, *history)
    [all_three] = answers(capfd, teacher, *history, "--include-seen")
    assert sorted(ids(new)) == ["i2", "i3"]
    assert sorted(ids(all_three)) == ["i1", "i2", "i3"]
    assert [item for item in ids(all_three) if item != "i1"] == ids(new)
    [of_all] = answers(capfd, teacher, "--history", "i1", "i9", "--top", "40")
    assert len(of_all["recommendations"]) == 38
    assert [item for item in ids(of_all) if item in ("i2", "i3")] == ids(new), "candidates are ranked alike"


def test_files_hold_what_is_printed(teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = answers(capfd, teacher, "--user", "u1", "u2", "--top", "3")
    for suffix in ("json", "jsonl", "parquet", "txt"):
        recommend.main([str(teacher), "--user", "u1", "u2", "--top", "3", "--out", str(tmp_path / f"out.{suffix}")])
    assert json.loads((tmp_path / "out.json").read_text()) == wanted
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == wanted
    table = pl.read_parquet(tmp_path / "out.parquet")
    rows = [(a["user_id"], e["rank"], e["item_id"], e["title"]) for a in wanted for e in a["recommendations"]]
    assert table.drop("score").rows() == rows
    assert (tmp_path / "out.txt").read_text().count("recommended:\n") == 2
    assert sorted(contents(tmp_path)) == ["out.json", "out.jsonl", "out.parquet", "out.txt"]


def test_item_vectors_of_another_rounding_are_used(
    srec: Trained, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As after training on two ranks, or an update: an evaluation would encode again, a recommendation does not."""

    def no_encoding(*_: Any) -> Any:
        raise AssertionError("the catalog is encoded")

    before = contents(srec.output)
    monkeypatch.setattr("trainer.workflows.item_vectors.software", lambda: {"trainer": "changed"})
    monkeypatch.setattr("trainer.evaluation.rankers.Batches.encode_catalog", no_encoding)
    assert len(answers(capfd, srec.output, "--user", "u7")) == 1
    assert contents(srec.output) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--user", "u1", "u2", "nobody", "none"], "2 of 4 users are not in"),
        (["--history", "i1", "Amber Bras No. 0"], "did you mean 'Amber Brass No. 12' (id i12) or"),
        (["--history", "i1", "--times", "soon"], "'soon' is not a time"),
        (["--history", "i1", "new", "--unknown", "read"], "sasrec knows items by id and cannot read titles"),
        (["--history", "new", "--unknown", "skip"], "none of its 1 items is in"),
        (["--user", "u1", "--times", "2024-01-01"], "--times are those of --history"),
        (["--user", "u1", "--format", "parquet"], "--format parquet cannot be printed"),
        (["--user", "u1", "--out", "x.csv"], "name a .txt, .json, .jsonl or .parquet file"),
        (["--user", "u1", "--out", "no/such/folder.json"], "is not a folder: make it first"),
        (["--user", "u1", "--candidates", "{empty}"], "has no items: write one per line"),
        (["--user", "u1", "--candidates", "{bad}"], "a candidate cannot be ranked: item 'i999' is not in"),
        (["--histories", "{bad}"], "line 1: Expecting value"),
        (["--users-file", "{empty}"], "has no users: write one per line"),
    ],
)
def test_bad_requests(refused: Refused, teacher: Path, tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "bad").write_text("i999\n")
    words = [word.format(empty=tmp_path / "empty", bad=tmp_path / "bad") for word in words]
    main: Main = recommend.main
    assert says in refused(main, teacher, *words)


def test_a_bad_request_imports_no_torch(teacher: Path) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'deepspeed', 'transformers'])\n"
        "import trainer\n"
        "assert 'pydantic' not in sys.modules, 'the package alone imports nothing'\n"
        f"run = trainer.load_run({str(teacher)!r})\n"
        "try: run.recommend([['nope']])\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "item 'nope' is not in" in done.stdout, done.stderr
