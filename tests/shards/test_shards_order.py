"""Facts about order, against counts with plain Python."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shards_helpers import read_users, table_options

from shards.__main__ import main
from shards.build import build
from shards.manifest import Manifest, read_manifest
from shards.stored import order
from shards.stored.order import order_facts
from shards.stored.users import Ints, StoredUsers, read_stored
from shards.synthetic import write_world


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("order")
    reviews, items = write_world(folder, users=300, items=25, min_length=8, max_length=16, order=0.6)
    options = table_options(reviews, meta=items, shards=3, users_per_record=40)
    return folder / "out", build(folder / "out", options)


def histories(users: StoredUsers, item_E: Ints) -> list[list[int]]:
    return [item_E[a:b].tolist() for a, b in zip(users.offset_U1[:-1], users.offset_U1[1:], strict=True)]


def rules(lists: list[list[int]], n: int) -> int:
    grams = Counter(tuple(items[i : i + n]) for items in lists for i in range(len(items) - n + 1))
    prefixes = Counter(tuple(items[i : i + n - 1]) for items in lists for i in range(len(items) - n + 2))
    return sum(count > 5 and count / prefixes[gram[:-1]] >= 0.1 for gram, count in grams.items())


def test_stored_users_are_whole_histories(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    expected = read_users(folder, manifest)
    for users in read_stored(folder, manifest):
        for row, items in enumerate(histories(users, users.item_E)):
            user = expected[int(users.user_U[row])]
            assert items == [*user.items, user.valid[0], user.test[0]]
            assert users.train_U[row] == len(user.items)
            assert users.has_test_U[row]


@pytest.mark.parametrize("part_events", [8_000_000, 700])
def test_rules_equal_plain_counts_however_they_are_divided(
    built: tuple[Path, Manifest], part_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_PART_EVENTS", part_events)
    folder, manifest = built
    blocks = list(read_stored(folder, manifest))
    original = [items for users in blocks for items in histories(users, users.item_E)]
    shuffled = [items for users in blocks for items in histories(users, users.shuffled_items(17))]
    assert [sorted(items) for items in original] == [sorted(items) for items in shuffled]
    found = order_facts(folder, manifest)
    assert (found.rules_2.original, found.rules_2.shuffled) == (rules(original, 2), rules(shuffled, 2))
    assert (found.rules_3.original, found.rules_3.shuffled) == (rules(original, 3), rules(shuffled, 3))
    assert found.rules_3.original > 10 * max(found.rules_3.shuffled, 1), "the world has a planted order"
    assert found.rules_2.ratio == found.rules_2.shuffled / found.rules_2.original


def test_the_chain_equals_a_plain_one(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    blocks = list(read_stored(folder, manifest))
    successors: dict[int, Counter[int]] = {}
    popularity: Counter[int] = Counter()
    tests = []
    for users in blocks:
        shuffled = histories(users, users.shuffled_items(17, keep_last=True))
        for row, items in enumerate(histories(users, users.item_E)):
            train = items[: users.train_U[row]]
            popularity.update(train)
            for first, second in itertools.pairwise(train):
                successors.setdefault(first, Counter())[second] += 1
            assert shuffled[row][-1] == items[-1]
            tests.append((items[-1], items[-2], shuffled[row][-2]))
    popular = sorted(popularity, key=lambda item: (-popularity[item], item))[:10]

    def listed(last: int) -> list[int]:
        count = successors.get(last, Counter())
        known = sorted(count, key=lambda item: (-count[item], item))[:10]
        return (known + [item for item in popular if item not in known])[:10]

    found = order_facts(folder, manifest)
    assert found.chain_hit_rate.original == pytest.approx(np.mean([t in listed(a) for t, a, _ in tests]))
    assert found.chain_hit_rate.shuffled == pytest.approx(np.mean([t in listed(b) for t, _, b in tests]))
    assert found.popular_hit_rate == pytest.approx(np.mean([t in popular for t, _, _ in tests]))
    pairs = [(set(listed(a)), set(listed(b))) for _, a, b in tests]
    assert found.chain_jaccard == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]))


def test_stats_print_the_facts_only_when_asked(
    built: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = built
    assert main(["stats", str(folder)]) == 0
    assert "2-gram rules" not in capsys.readouterr().out
    assert main(["stats", str(folder), "--order"]) == 0
    text = capsys.readouterr().out
    assert "2-gram rules" in text
    assert "later than the median test event" in text
    assert main(["stats", str(folder), "--order", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["order"]
    assert found["rules_2"]["original"] > found["rules_2"]["shuffled"]


def test_a_damaged_shard_is_named(
    built: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(built[0], tmp_path / "copy"))
    shard = folder / read_manifest(folder).shards[1].name
    content = bytearray(shard.read_bytes())
    content[600:900] = bytes(300)
    shard.write_bytes(bytes(content))
    assert main(["stats", str(folder), "--order"]) == 2
    assert f"{shard} cannot be read" in capsys.readouterr().err
