"""The file of item vectors: used only if it gives what encoding would give, and never in the way."""

from __future__ import annotations

import errno
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.data.collators.base import ItemIds
from trainer.data.collators.sequences import SequenceCollator
from trainer.distributed import World
from trainer.evaluation.item_vectors import ItemVectorFile, item_vectors
from trainer.evaluation.rankers import Batches
from trainer.models.scoring import VectorScoring

ITEMS = 10
FACTS = {"weights": "abc", "system": {"llm": {"dtype": "bfloat16"}}}


class Encoder(torch.nn.Module):
    """Encodes item ids and counts them."""

    def __init__(self, rows: int = ITEMS) -> None:
        super().__init__()
        self.table = torch.randn(rows + 1, 4, generator=torch.Generator().manual_seed(0))
        self.encoded = 0

    def user_vectors(self, batch: Any) -> Tensor:
        raise AssertionError("no user is encoded here")

    def item_vectors(self, batch: ItemIds) -> Tensor:
        self.encoded += len(batch.item_M)
        return self.table[batch.item_M]


def read_or_encode(kept: ItemVectorFile | None, world: World | None = None, items: int = ITEMS) -> tuple[Tensor, int]:
    """The vectors, and how many items were encoded."""
    encoder = Encoder(items)
    scoring = VectorScoring(encoder, SequenceCollator(items, 6, negatives=1, fixed_length=True, seed=0))
    world = world or World(0, 1, torch.device("cpu"))
    return item_vectors(scoring, items, Batches(world, 3, lambda: None), kept), encoder.encoded


@pytest.fixture
def kept(tmp_path: Path) -> ItemVectorFile:
    """A file that was written."""
    file = ItemVectorFile(tmp_path / "run" / "item_vectors.safetensors", FACTS)
    file.path.parent.mkdir()
    assert read_or_encode(file)[1] == ITEMS
    return file


def names(kept: ItemVectorFile) -> list[str]:
    return sorted(path.name for path in kept.path.parent.iterdir())


def test_vectors_that_were_kept_are_read(kept: ItemVectorFile, caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = read_or_encode(None)
    with caplog.at_level(logging.INFO, "trainer"):
        found, encoded = read_or_encode(kept)
    assert encoded == 0
    assert torch.equal(found, expected)
    assert caplog.messages == [f"item vectors read from {kept.path}"]
    assert names(kept) == ["item_vectors.safetensors"]
    assert kept.path.stat().st_mode & 0o777 == 0o644


def test_vectors_of_something_else_are_replaced(kept: ItemVectorFile) -> None:
    """Other weights, another setting, and a catalog of another size; afterwards the file is theirs."""
    for facts in (FACTS | {"weights": "abd"}, {"weights": "abc", "system": {"llm": {"dtype": "float32"}}}, {}):
        other = ItemVectorFile(kept.path, facts)
        assert read_or_encode(other)[1] == ITEMS
        assert read_or_encode(other)[1] == 0
    assert read_or_encode(kept)[1] == ITEMS
    assert read_or_encode(kept, items=ITEMS + 1)[1] == ITEMS + 1
    assert names(kept) == ["item_vectors.safetensors"]


def flip(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(bytes(content))

    return damage


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def doubled(path: Path) -> None:
    """Other vectors under the facts and the digest of the file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata()
    save_file({"item_vectors": 2 * load_file(path)["item_vectors"]}, path, facts)


@pytest.mark.parametrize(
    "damage",
    [
        flip(-1),
        flip(-4 * ITEMS),
        flip(0),
        flip(9),
        flip(40),
        foreign,
        doubled,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_text("not vectors at all"),
    ],
    ids=["last byte", "data", "length", "header", "header 40", "foreign", "doubled", "empty", "cut", "text"],
)
def test_a_damaged_file_is_ignored_and_written_again(kept: ItemVectorFile, damage: Callable[[Path], None]) -> None:
    expected, _ = read_or_encode(None)
    damage(kept.path)
    found, encoded = read_or_encode(kept)
    assert encoded == ITEMS
    assert torch.equal(found, expected)
    assert read_or_encode(kept)[1] == 0
    assert names(kept) == ["item_vectors.safetensors"]


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    """Root may write to any folder, so the system's answer is planted."""

    def refuse(**options: Any) -> Any:
        raise OSError(error, "refused")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    kept = ItemVectorFile(tmp_path / "item_vectors.safetensors", FACTS)
    found, encoded = read_or_encode(kept)
    assert encoded == ITEMS
    assert torch.equal(found, read_or_encode(None)[0])
    assert [message.split(", the next")[0] for message in caplog.messages] == [
        f"item vectors cannot be kept in {kept.path}"
    ]
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(kept: ItemVectorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.runs import atomic

    before = kept.path.read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "sync", full)
    assert read_or_encode(ItemVectorFile(kept.path, {}))[1] == ITEMS
    assert kept.path.read_bytes() == before
    assert names(kept) == ["item_vectors.safetensors"]


class TwoRanks(World):
    """One of two ranks whose collectives are answered by the test."""

    def all_gather_value(self, value: float) -> list[float]:
        return [value, others_value]

    def all_gather_rows(self, local: Tensor, sizes: Any) -> Tensor:
        return local


others_value = 1.0


@pytest.mark.parametrize(("rank", "other", "read"), [(0, 1.0, True), (1, 1.0, True), (0, 0.0, False), (1, 0.0, False)])
def test_all_ranks_read_or_none(
    kept: ItemVectorFile, monkeypatch: pytest.MonkeyPatch, rank: int, other: float, read: bool
) -> None:
    """A rank that cannot see the file makes all encode; only rank 0 writes."""
    monkeypatch.setitem(globals(), "others_value", other)
    before = kept.path.stat().st_mtime_ns, kept.path.stat().st_ino
    _, encoded = read_or_encode(kept, TwoRanks(rank, 2, torch.device("cpu")))
    assert encoded == (0 if read else ITEMS // 2)
    written = (kept.path.stat().st_mtime_ns, kept.path.stat().st_ino) != before
    assert written == (not read and rank == 0)
