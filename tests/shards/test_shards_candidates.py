import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards_helpers import options, read_users, world, write_amazon

from shards.build import build, prepare
from shards.manifest import DatasetError
from shards.splitmix import mix
from shards.writing.candidates import Owned, negative_blocks, owned_items


def owned(*users: set[int]) -> Owned:
    lengths = [len(items) for items in users]
    items = [item for user in users for item in sorted(user)]
    return Owned(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.array(items, dtype=np.int64))


def keys(count: int, start: int = 1) -> npt.NDArray[np.uint64]:
    return mix(np.arange(start, start + count, dtype=np.uint64))


def negatives(own: Owned, num_items: int, count: int, seed: int = 0, stream: str = "x") -> npt.NDArray[np.int32]:
    users = len(own.offsets) - 1
    blocks = negative_blocks(own, keys(users), num_items, count, seed=seed, stream=stream)
    return np.concatenate(list(blocks))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_distinct_items_in_range_that_the_user_never_touched(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(2, 200))
    item = st.integers(1, num_items)
    users = data.draw(st.lists(st.sets(item, min_size=1, max_size=num_items - 1), min_size=1, max_size=20))
    count = data.draw(st.integers(1, num_items - max(map(len, users))))
    drawn = negatives(owned(*users), num_items, count, seed=data.draw(st.integers(-5, 5)))
    assert drawn.shape == (len(users), count)
    assert drawn.dtype == np.int32
    assert drawn.min() >= 1
    assert drawn.max() <= num_items
    for row, own in zip(drawn.tolist(), users, strict=True):
        assert len(set(row)) == count
        assert not set(row) & own


def test_uniform_over_the_others() -> None:
    users = [{1, 2, 3, 50}] * 6000
    counts = np.bincount(negatives(owned(*users), 50, 5).ravel(), minlength=51)[1:]
    others = np.setdiff1d(np.arange(50), [0, 1, 2, 49])
    assert counts.sum() == counts[others].sum() == 30_000
    expected = 30_000 / 46
    assert ((counts[others] - expected) ** 2 / expected).sum() < 90  # chi-square, 45 degrees: p < 1e-4
    # Pairs too: item 4 comes with every other item equally often.
    rows = negatives(owned(*users), 50, 5, seed=1)
    with_four = rows[(rows == 4).any(axis=1)].ravel()
    pairs = np.bincount(with_four[with_four != 4], minlength=51)[1:][np.setdiff1d(others, [3])]
    assert ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum() < 90


def test_uniform_where_rejection_gives_up() -> None:
    """300 own of 303 items: rejection gives up and all items are ranked."""
    users = [set(range(2, 302))] * 3000
    drawn = negatives(owned(*users), 303, 1)
    counts = np.bincount(drawn.ravel(), minlength=304)
    assert set(np.nonzero(counts)[0]) == {1, 302, 303}
    assert counts[counts > 0].min() > 900


def test_exactly_enough_items() -> None:
    drawn = negatives(owned(set(range(1, 101)), {1}), 199, 99)
    assert sorted(drawn[0].tolist()) == list(range(101, 200))


def test_addressed_by_user_seed_and_stream() -> None:
    users = [{n % 40 + 1, n % 17 + 41} for n in range(5000)]
    first = negatives(owned(*users), 1000, 20)
    assert np.array_equal(negatives(owned(*users[:77]), 1000, 20), first[:77])
    blocks = negative_blocks(owned(*users[3000:]), keys(2000, start=3001), 1000, 20, seed=0, stream="x")
    assert np.array_equal(np.concatenate(list(blocks)), first[3000:])
    for other in (negatives(owned(*users), 1000, 20, seed=1), negatives(owned(*users), 1000, 20, stream="y")):
        shared = [len(set(a) & set(b)) for a, b in zip(first.tolist(), other.tolist(), strict=True)]
        assert 0.3 < np.mean(shared) < 0.5  # 20 * 20 / 998 by chance


def test_a_dataset_holds_four_different_sets(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path, world(items=60))
    manifest = build(tmp_path / "out", options(reviews, meta, negatives=20, title_negatives=9))
    users = read_users(tmp_path / "out", manifest)
    arrays = {}
    for task, width in (("retrieval", 20), ("title", 9)):
        for split in ("valid", "test"):
            array = np.load(tmp_path / f"out/candidates/{task}-{split}.npy", mmap_mode="r")
            assert (array.shape, array.dtype, array.flags.c_contiguous) == ((30, width), np.int32, True)
            arrays[task, split] = array
            for user, row in enumerate(array.tolist()):
                own = {*users[user].items, users[user].valid[0], users[user].test[0]}
                assert not own & set(row)
    for task in ("retrieval", "title"):
        assert not np.array_equal(arrays[task, "valid"], arrays[task, "test"])
    assert not np.array_equal(arrays["retrieval", "test"][:, :9], arrays["title", "test"])


def test_repeated_purchases_count_once(tmp_path: Path) -> None:
    events = [*world(), *((user, item, time + 1) for user, item, time in world())]
    reviews, meta = write_amazon(tmp_path, events)
    dataset = prepare(options(reviews, meta))
    owned = owned_items(dataset.sequences, dataset.users.num_items)
    assert np.diff(owned.offsets).tolist() == [12] * 30


@pytest.mark.parametrize("option", ["negatives", "title_negatives"])
def test_too_few_items_to_draw_from(tmp_path: Path, option: str) -> None:
    reviews, meta = write_amazon(tmp_path, world())
    flag = "--" + option.replace("_", "-")
    with pytest.raises(DatasetError, match=f"{flag} 19: a user with 12 of the 30 items.*{flag} to at most 18"):
        prepare(options(reviews, meta, **{option: 19}))
    prepare(options(reviews, meta, **{option: 18}))
    with pytest.raises(DatasetError, match=f"{flag} 0: give at least 1"):
        prepare(options(reviews, meta, **{option: 0}))


def test_fast_enough_for_large_categories() -> None:
    """Measured 114,000 users per second for 99 of 30,000; a tenth of that would mean that a Python loop crept in."""
    users = 20_000
    items = np.random.default_rng(0).integers(1, 30_001, (users, 12))
    own = Owned(np.arange(0, 12 * users + 1, 12), np.sort(items, axis=1).ravel().astype(np.int64))
    start = time.process_time()
    drawn = negatives(own, 30_000, 99)
    assert users / (time.process_time() - start) > 10_000
    assert drawn.shape == (users, 99)
