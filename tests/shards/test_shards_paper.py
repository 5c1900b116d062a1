"""The paper's datasets by name: as the official code builds them, with files that are there, missing, or fetched."""

import dataclasses
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
from shards_helpers import Event, options, read_named, world, write_amazon, write_csv

from shards.__main__ import DATASET_NAMES, main
from shards.build import build
from shards.manifest import read_manifest
from shards.paper.datasets import PAPER_DATASETS, against_table_10
from shards.statistics import TABLE_10

SPLITS = ("train", "valid", "test")
HEADER = "user_id,parent_asin,timestamp"
Rows = dict[str, list[Event]]


def five_core(users: int = 80, items: int = 40, seed: int = 0) -> Rows:
    """A leave-last-out split in which users appear in no order; some have their first event in the test file."""
    chance = random.Random(seed)
    rows: Rows = {split: [] for split in SPLITS}
    for user in chance.sample(range(users), users):
        length = chance.randint(5, 12) if user % 9 else 1
        bought = [f"B{chance.randrange(items) ** 2 // items:03}" for _ in range(length)]
        times = [1_500_000_000_000 + user + 86_400_000 * day for day in range(length)]
        events = [(f"user {user}", item, time) for item, time in zip(bought, times, strict=True)]
        rows["train"] += events[:-2]
        rows["valid"] += events[-2:-1]
        rows["test"] += events[-1:]
    return rows


def official(rows: Rows, fraction: float) -> dict[str, dict[str, list[str]]]:
    """The official preprocessing in plain Python: data_preprocess.py of Sein-Kim/LLM-SRec, without its renumbering."""
    by_user: dict[str, dict[str, list[str]]] = defaultdict(lambda: {split: [] for split in SPLITS})
    for split in SPLITS:
        for user, item, _ in rows[split]:
            by_user[user][split].append(item)
    random.seed(0)
    kept = random.sample(list(by_user), int(len(by_user) * fraction))
    count_user: dict[str, int] = defaultdict(int)
    count_item: dict[str, int] = defaultdict(int)
    for user in kept:
        for split in SPLITS:
            for item in by_user[user][split]:
                count_user[user] += 1
                count_item[item] += 1
    result = {}
    for user in kept:
        often = {split: [item for item in by_user[user][split] if count_item[item] > 4] for split in SPLITS}
        if count_user[user] > 4 and len(often["train"]) > 4:
            result[user] = often
    return result


def write_raw(folder: Path, category: str, rows: Rows) -> None:
    folder.mkdir(parents=True)
    for split in SPLITS:
        write_csv(folder / f"{category}.{split}.csv", rows[split], HEADER)
    items = sorted({item for events in rows.values() for _, item, _ in events})
    lines = [json.dumps({"parent_asin": item, "title": f"Title {item}", "description": []}) + "\n" for item in items]
    with gzip.open(folder / f"meta_{category}.jsonl.gz", "wt") as file:
        file.write("".join(lines))


@pytest.mark.parametrize("name", ["scientific", "cds"])
def test_the_same_users_and_items_as_the_official_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    dataset = PAPER_DATASETS[name]
    rows = five_core()
    write_raw(tmp_path / "raw/deeper", dataset.category, rows)
    argv = ["build", str(tmp_path / "out"), "--dataset", name, "--raw", str(tmp_path / "raw")]
    assert main([*argv, "--negatives", "2", "--title-negatives", "2"]) == 0
    manifest = read_manifest(tmp_path / "out")
    expected = official(rows, dataset.user_fraction)
    assert 5 < len(expected) < 80
    assert read_named(tmp_path / "out", manifest) == expected
    assert (manifest.name, manifest.build["user_sample"]) == (dataset.name, "official")
    row = next(row for row in TABLE_10 if row.name == dataset.name)
    said = capsys.readouterr().err
    assert f"users: {len(expected)}, in Table 10 of the paper {row.users:,}: -" in said


def test_counts_that_equal_table_10_say_so(tmp_path: Path) -> None:
    events = world()
    manifest = build(tmp_path / "out", options(*write_amazon(tmp_path / "in", events), name="CDs"))
    row = TABLE_10[3]
    counted = dataclasses.replace(
        manifest.statistics, users=row.users, items=row.items, interactions=row.interactions + 1
    )
    same = dataclasses.replace(manifest, statistics=counted)
    users, items, interactions = against_table_10(same)
    assert users == "users: 18,481, in Table 10 of the paper 18,481: equal"
    assert items.endswith("equal")
    assert interactions.endswith("284,695: +1 (+0.00%)")
    assert against_table_10(dataclasses.replace(manifest, name="mine")) == []


def test_missing_files_are_named_with_where_they_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw", "Movies_and_TV", five_core())
    (tmp_path / "raw/Movies_and_TV.valid.csv").unlink()
    argv = ["build", str(tmp_path / "out"), "--dataset", "movies", "--raw", str(tmp_path / "raw")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    place = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/benchmark/5core/last_out"
    assert f"Movies_and_TV.valid.csv from {place}/Movies_and_TV.valid.csv: put them there, or add --download" in said
    assert "Movies_and_TV.train.csv from" not in said
    assert main([*argv, "--source", "table"]) == 2
    assert "takes no --source" in capsys.readouterr().err
    assert main([*argv, "--user-fraction", "0.1"]) == 2
    assert "--dataset movies sets --user-fraction as the paper's code does: remove it" in capsys.readouterr().err


def test_names_that_help_lists_are_the_datasets() -> None:
    assert list(PAPER_DATASETS) == DATASET_NAMES
