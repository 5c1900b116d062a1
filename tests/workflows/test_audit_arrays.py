"""Arrays of a user's own model: read from each kind of file, and refused by name when they are wrong."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from examples.audit_recbole import arrays as recbole_arrays
from examples.audit_recbole import shuffled
from launchers import audit as command
from trainer.evaluation.order.audit import Audit, ListAnswers, VectorAnswers, audit
from trainer.workflows.audit.arrays import SCHEMA, read_arrays, to_input

RNG = np.random.default_rng(0)
USERS, ITEMS = 6, 20


def of_vectors() -> dict[str, Any]:
    return {
        "target": RNG.integers(1, ITEMS + 1, USERS),
        "item_vectors": RNG.normal(size=(ITEMS, 4)).astype(np.float32),
        "user_vectors": RNG.normal(size=(USERS, 4)).astype(np.float32),
        "user_vectors_shuffled": RNG.normal(size=(USERS, 4)).astype(np.float32),
    }


def of_lists() -> dict[str, Any]:
    tops = [np.stack([RNG.permutation(ITEMS)[:10] + 1 for _ in range(USERS)]) for _ in range(2)]
    return {"target": RNG.integers(1, ITEMS + 1, USERS), "top": tops[0], "top_shuffled": tops[1]}


def test_all_kinds_of_files_give_the_same_audit(tmp_path: Path) -> None:
    arrays = of_vectors() | {"history": RNG.integers(0, ITEMS + 1, (USERS, 5)), "train_count": np.arange(ITEMS)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, tmp_path / "a.safetensors")
    item_names = ("item_vectors", "train_count")
    pl.DataFrame({key: list(value) for key, value in arrays.items() if key in item_names}).write_parquet(
        tmp_path / "items.parquet"
    )
    pl.DataFrame({key: list(value) for key, value in arrays.items() if key not in item_names}).write_parquet(
        tmp_path / "users.parquet"
    )
    whole = audit(read_arrays([tmp_path / "a.npz"], "m"))
    assert len(whole.inference) >= 6
    assert audit(read_arrays([tmp_path / "a.safetensors"], "m")) == whole
    assert audit(read_arrays([tmp_path / "users.parquet", tmp_path / "items.parquet"], "m")) == whole


def test_shuffled_rows_are_brought_into_the_order_of_the_users() -> None:
    arrays = of_vectors()
    order = RNG.permutation(USERS)
    users = np.array([f"u{n}" for n in range(USERS)])
    moved = arrays | {
        "user": users,
        "user_shuffled": users[order],
        "user_vectors_shuffled": arrays["user_vectors_shuffled"][order],
    }
    assert audit(to_input(moved, "m")) == audit(to_input(arrays, "m"))


def changed(arrays: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    return {key: value for key, value in {**arrays, **values}.items() if value is not None}


NAN = of_vectors()["user_vectors"].copy()
NAN[4, 1] = np.nan
TWICE = of_lists()["top"].copy()
TWICE[2, 1] = TWICE[2, 0]
NAMES = np.array([f"u{n}" for n in range(USERS)])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed(of_vectors(), target=None), "target is missing"),
        (changed(of_vectors(), user_vectors_shuffled=None), "user_vectors_shuffled is missing"),
        (changed(of_vectors(), item_vectors=None), "item_vectors is missing"),
        (changed(of_lists(), top_shuffled=None), "top_shuffled is missing"),
        (changed(of_vectors(), user_vectors=NAN), r"user_vectors has NaN or infinity in 1 rows \(first: 4\)"),
        (changed(of_vectors(), user_vectors=np.ones((5, 4))), r"user_vectors has the shape \(5, 4\), not \(6, 4\)"),
        (changed(of_vectors(), user_vectors=np.zeros((6, 3))), r"user_vectors has the shape \(6, 3\), not \(6, 4\)"),
        (changed(of_vectors(), target=np.zeros(6, np.int64)), "target holds items 0 to 0, but ids run from 1 to 20"),
        (changed(of_vectors(), target=np.ones(6)), r"target is float64 of shape \(6,\), not whole numbers"),
        (changed(of_vectors(), target=np.zeros(0, np.int64)), "target has no users"),
        (changed(of_vectors(), history=np.full((6, 2), 21)), "history holds items 21 to 21"),
        (changed(of_vectors(), history=np.ones((5, 2), np.int64)), "history has 5 rows, but target has 6 users"),
        (changed(of_vectors(), train_count=np.ones(3, np.int64)), "train_count has 3 entries"),
        (changed(of_lists(), top=TWICE), "top lists an item twice for a user"),
        (changed(of_lists(), top=TWICE[:2]), "top has 2 rows, but target has 6 users"),
        (changed(of_lists(), num_items=np.array(5)), "target holds items .* but ids run from 1 to 5"),
        (changed(of_vectors(), user_shuffled=NAMES), "user_shuffled needs user"),
        (
            changed(of_vectors(), user=NAMES, user_shuffled=np.char.add(NAMES, "x")),
            r"6 unknown users \(u0x, u1x, u2x\)",
        ),
        (changed(of_vectors(), user=np.repeat("a", 6)), "user names a user twice"),
        (changed(of_vectors(), user_vectors_trained_shuffled=NAN), "needs item_vectors_trained_shuffled"),
    ],
)
def test_wrong_arrays_are_named_with_the_schema(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        to_input(arrays, "m")
    assert str(error.value).endswith(SCHEMA)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.npz does not exist"):
        read_arrays([tmp_path / "none.npz"], "m")
    with pytest.raises(ValueError, match=r"a\.csv is not a \.npz, \.safetensors, \.parquet file"):
        read_arrays([tmp_path / "a.csv"], "m")
    for suffix in ("npz", "safetensors", "parquet"):
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=rf"damaged\.{suffix} cannot be read"):
            read_arrays([path], "m")
    np.savez(tmp_path / "more.npz", scores=np.zeros(3))
    with pytest.raises(ValueError, match="an unknown array 'scores'"):
        read_arrays([tmp_path / "more.npz"], "m")
    np.savez(tmp_path / "objects.npz", target=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npz cannot be read"):
        read_arrays([tmp_path / "objects.npz"], "m")


def test_a_file_made_to_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("target.npy", "w") as member:
        for _ in range(80):  # above what any file may hold
            member.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="decompress to more than 200 times its size"):
        read_arrays([path], "m")


def test_the_command_prints_one_page_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "mine.npz", **of_lists())
    command.main(["--arrays", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "page")])
    page = capsys.readouterr().out
    assert page.startswith("Order audit of mine\n")
    assert "similarity of representations: needs vectors instead of lists" in page
    assert (tmp_path / "page.md").read_text().startswith("# Order audit of mine\n")
    content = json.loads((tmp_path / "page.json").read_text())
    assert content["format"] == Audit.FORMAT
    assert [change["group"] for change in content["inference"]] == ["all users", "all users"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the two"),
        (["run", "--arrays", "a.npz"], "one of the two"),
        (["--arrays", "a.npz", "--users", "5"], "are for runs"),
        (["run", "--users", "0"], "--users 0: give the number"),
        (["run", "--out", "/nowhere/page"], "/nowhere is not a folder: create it"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(words)


class LikeRecBole(nn.Module):
    """RecBole's interface: items in front, padding behind; the user vector is that of the last item."""

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(ITEMS + 1, 4, padding_idx=0)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        last: Tensor = self.item_embedding(item_seq.gather(1, item_seq_len[:, None] - 1)[:, 0])
        return last


def test_the_example_for_recbole_writes_what_an_audit_needs() -> None:
    generator = torch.Generator().manual_seed(1)
    item_UL = torch.randint(1, ITEMS + 1, (USERS, 7), generator=generator)
    length_U = torch.tensor([7, 5, 3, 2, 1, 6])
    item_UL[torch.arange(7) >= length_U[:, None]] = 0
    mixed_UL = shuffled(item_UL, length_U, generator)
    assert torch.equal(mixed_UL.sort().values, item_UL.sort().values)
    assert torch.equal(mixed_UL == 0, item_UL == 0), "padding stays behind"
    batch = {"item_id_list": item_UL, "item_length": length_U, "item_id": torch.arange(1, USERS + 1)}
    model = LikeRecBole()
    given = to_input(recbole_arrays(model, [batch, batch]), "recbole")
    assert isinstance(given.original, VectorAnswers)
    assert not isinstance(given.shuffled, ListAnswers)
    assert given.num_items == ITEMS
    np.testing.assert_array_equal(given.original.item_ND[0], model.item_embedding.weight[1].detach().numpy())
    assert audit(given).users == 2 * USERS
