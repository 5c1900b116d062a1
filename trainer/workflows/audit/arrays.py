"""Arrays of a user's own model for an audit: npz, safetensors or parquet files; `docs/audit.md` has the schema.

Letters: U users, N items, D width of the vectors, K length of a list, L length of the longest history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from shards.manifest import MAX_EXPANSION
from trainer.evaluation.order.audit import Answers, AuditInput, ListAnswers, VectorAnswers, Vectors
from trainer.evaluation.order.groups import adjacent_pairs, count_keys, transition_scores
from trainer.evaluation.ranking import Ints

Array = npt.NDArray[Any]

SCHEMA: Final = (
    "target (U,) with user_vectors, user_vectors_shuffled (U, D) and item_vectors (N, D), or with top, top_shuffled "
    "(U, K); optional: user, user_shuffled (U,), history (U, L), train_count (N,), num_items, "
    "user_vectors_trained_shuffled and item_vectors_trained_shuffled, or top_trained_shuffled; see docs/audit.md"
)

_USERS = ("target", "user", "user_shuffled", "history")
_VECTORS = ("user_vectors", "user_vectors_shuffled", "user_vectors_trained_shuffled")
_LISTS = ("top", "top_shuffled", "top_trained_shuffled")
_ITEMS = ("item_vectors", "item_vectors_trained_shuffled", "train_count", "num_items")
NAMES: Final = (*_USERS, *_VECTORS, *_LISTS, *_ITEMS)
_SHUFFLED = ("user_vectors_shuffled", "top_shuffled")
"""Arrays in the order of `user_shuffled`."""
# The last two are of an array whose header is no Python.
_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, MemoryError, BadZipFile, SafetensorError, pa.ArrowException, SyntaxError,
    TokenError,
)  # fmt: skip
_SMALL = 64 << 20
"""A file may decompress to this many bytes, however well it is compressed."""


def read_arrays(paths: Sequence[Path], name: str) -> AuditInput:
    """Read and check the arrays of a model; files may each hold a part of them.

    Args:
        name: of the model, for the report.

    Raises:
        ValueError: a file cannot be read, or an array is missing or wrong; the message names it, and the schema.
    """
    found: dict[str, Array] = {}
    for path in paths:
        for key, value in _read(path).items():
            if key not in NAMES:
                raise _wrong(f"{path} has an unknown array {key!r}")
            if key in found:
                raise _wrong(f"{path} has {key!r}, which an earlier file has too")
            found[key] = value
    return to_input(found, name)


def to_input(given: Mapping[str, Array], name: str) -> AuditInput:
    """Check arrays by name (`NAMES`), as `read_arrays` reads them.

    Raises:
        ValueError: an array is missing or wrong; the message names it, and the schema.
    """
    arrays = dict(given)
    if "target" not in arrays:
        raise _wrong("target is missing")
    target_U = _integers(arrays, "target", dims=1)
    if not len(target_U):
        raise _wrong("target has no users")
    _align(arrays, len(target_U))
    answers = _vectors(arrays, len(target_U)) if "item_vectors" in arrays else _lists(arrays, len(target_U))
    num_items = _count_items(arrays, answers[0])
    for key in ("target", *(_LISTS if isinstance(answers[0], ListAnswers) else ())):
        if key in arrays:
            _check_ids(arrays[key], key, lowest=int(key == "target"), num_items=num_items)
    history = _history(arrays, len(target_U), num_items)
    event_N = None
    if "train_count" in arrays:
        event_N = _integers(arrays, "train_count", dims=1)
        if len(event_N) != num_items or event_N.min() < 0:
            raise _wrong(f"train_count has {len(event_N)} entries, or negative ones, for {num_items} items")
    seen, scores = None, None
    if history is not None:
        item_E, offset_U1 = history
        row_P, key_P = adjacent_pairs(item_E, offset_U1, num_items)
        scores = transition_scores(row_P, count_keys(key_P, key_P), len(target_U))
        seen = [item_E[start:end] for start, end in pairwise(offset_U1.tolist())]
    return AuditInput(name, num_items, target_U, *answers, seen, scores, event_N)


def _vectors(arrays: dict[str, Array], users: int) -> tuple[Answers, Answers, Answers | None]:
    item_ND = _floats(arrays, "item_vectors")
    made: list[Answers | None] = []
    for key in _VECTORS:
        if key not in arrays:
            if key == "user_vectors_trained_shuffled":
                made.append(None)
                continue
            raise _wrong(f"{key} is missing")
        items = item_ND
        if key == "user_vectors_trained_shuffled" and "item_vectors_trained_shuffled" not in arrays:
            raise _wrong(f"{key} needs item_vectors_trained_shuffled, the item vectors of that model")
        if key == "user_vectors_trained_shuffled":
            items = _floats(arrays, "item_vectors_trained_shuffled")
            if len(items) != len(item_ND):
                raise _wrong(f"item_vectors_trained_shuffled has {len(items)} items, but item_vectors {len(item_ND)}")
        user_UD = _floats(arrays, key)
        if user_UD.shape != (users, items.shape[1]):
            raise _wrong(
                f"{key} has the shape {user_UD.shape}, not {(users, items.shape[1])}, that of target and items"
            )
        made.append(VectorAnswers(user_UD, items))
    original, shuffled, trained = made
    assert original is not None, "it is required"
    assert shuffled is not None, "it is required"
    return original, shuffled, trained


def _lists(arrays: dict[str, Array], users: int) -> tuple[Answers, Answers, Answers | None]:
    if "top" not in arrays:
        what = "item_vectors" if "user_vectors" in arrays else "item_vectors or top"
        raise _wrong(f"{what} is missing")
    made: list[Answers] = []
    for key in _LISTS:
        if key not in arrays:
            if key == "top_trained_shuffled":
                continue
            raise _wrong(f"{key} is missing")
        top_UK = _integers(arrays, key, dims=2)
        if len(top_UK) != users:
            raise _wrong(f"{key} has {len(top_UK)} rows, but target has {users} users")
        ordered_UK = np.sort(top_UK, axis=1)
        if bool(((ordered_UK[:, 1:] == ordered_UK[:, :-1]) & (ordered_UK[:, 1:] > 0)).any()):
            raise _wrong(f"{key} lists an item twice for a user")
        made.append(ListAnswers(top_UK))
    return made[0], made[1], made[2] if len(made) > 2 else None


def _align(arrays: dict[str, Array], users: int) -> None:
    """Bring arrays of shuffled histories, whose rows are those of `user_shuffled`, into the order of `user`."""
    if "user_shuffled" in arrays and "user" not in arrays:
        raise _wrong("user_shuffled needs user, the ids in the order of the other arrays")
    for key in ("user", "user_shuffled"):
        if key in arrays:
            ids = arrays[key]
            if ids.shape != (users,):
                raise _wrong(f"{key} has the shape {ids.shape}, not {(users,)}")
            if len(np.unique(ids)) < users:
                raise _wrong(f"{key} names a user twice")
    if "user_shuffled" not in arrays:
        return
    shuffled, own = (arrays[key].astype(str) for key in ("user_shuffled", "user"))
    if unknown := sorted(set(shuffled.tolist()) - set(own.tolist())):
        raise _wrong(
            f"user_shuffled names {len(unknown)} unknown users ({', '.join(unknown[:3])}), who are not in user"
        )
    place_of = {user: place for place, user in enumerate(shuffled.tolist())}
    rows = np.array([place_of[user] for user in own.tolist()])
    for key in _SHUFFLED:
        if key in arrays and len(arrays[key]) == users:
            arrays[key] = arrays[key][rows]


def _count_items(arrays: dict[str, Array], original: Answers) -> int:
    if isinstance(original, VectorAnswers):
        return len(original.item_ND)
    if "num_items" in arrays:
        return int(_integers(arrays, "num_items", dims=0))
    if "train_count" in arrays:
        return int(arrays["train_count"].size)
    present = (arrays[key] for key in ("target", "history", *_LISTS) if key in arrays)
    return max(int(ids.max(initial=0)) for ids in present)


def _history(arrays: dict[str, Array], users: int, num_items: int) -> tuple[Ints, Ints] | None:
    """Items of all histories joined, and where each user's begin; None if there are no histories."""
    if "history" not in arrays:
        return None
    history_UL = _integers(arrays, "history", dims=2)
    if len(history_UL) != users:
        raise _wrong(f"history has {len(history_UL)} rows, but target has {users} users")
    _check_ids(history_UL, "history", lowest=0, num_items=num_items)
    length_U = (history_UL > 0).sum(1)
    return history_UL[history_UL > 0], np.concatenate([[0], np.cumsum(length_U)])


def _check_ids(ids: Array, key: str, *, lowest: int, num_items: int) -> None:
    if ids.size and not lowest <= ids.min() <= ids.max() <= num_items:
        raise _wrong(f"{key} holds items {ids.min()} to {ids.max()}, but ids run from {lowest} to {num_items}")


def _integers(arrays: dict[str, Array], key: str, dims: int) -> Ints:
    value = arrays[key]
    if value.ndim != dims or value.dtype.kind not in "iu":
        raise _wrong(f"{key} is {value.dtype} of shape {value.shape}, not whole numbers in {dims} dimensions")
    return value.astype(np.int64)


def _floats(arrays: dict[str, Array], key: str) -> Vectors:
    value = arrays[key]
    if value.ndim != 2 or value.dtype.kind != "f" or not value.size:
        raise _wrong(f"{key} is {value.dtype} of shape {value.shape}, not floats in 2 dimensions")
    with np.errstate(over="ignore"):
        vectors: Vectors = np.array(value, dtype=np.float32, order="C")
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise _wrong(f"{key} has NaN or infinity in {len(bad)} rows (first: {bad[0]})")
    return vectors


def _read(path: Path) -> dict[str, Array]:
    readers: dict[str, Callable[[Path], dict[str, Array]]] = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _wrong(f"{path} is not a {', '.join(readers)} file")
    try:
        return reader(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except _UNREADABLE as e:
        raise _wrong(f"{path} cannot be read ({' '.join(str(e).split())[:200]})") from None


def _read_npz(path: Path) -> dict[str, Array]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        if sum(member.file_size for member in file.zip.infolist()) > max(_SMALL, MAX_EXPANSION * path.stat().st_size):
            raise ValueError(f"it would decompress to more than {MAX_EXPANSION} times its size")
        return {key: file[key] for key in file.files}


def _read_safetensors(path: Path) -> dict[str, Array]:
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def _read_parquet(path: Path) -> dict[str, Array]:
    """Columns of a table with a row per user, or per item in the order of ids; lists become padded rows."""
    with path.open("rb") as raw, pq.ParquetFile(raw) as file:
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        columns = [group.column(place) for group in groups for place in range(group.num_columns)]
        stored = sum(column.total_compressed_size for column in columns)
        if sum(column.total_uncompressed_size for column in columns) > max(_SMALL, MAX_EXPANSION * stored):
            raise ValueError(f"it would decompress to more than {MAX_EXPANSION} times its size")
        table = file.read()
    return {name: _column(name, table[name].combine_chunks()) for name in table.column_names}


def _column(name: str, column: pa.Array) -> Array:
    if column.null_count:
        raise ValueError(f"column {name!r} has empty rows")
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
        plain: Array = column.to_numpy(zero_copy_only=False)
        return plain
    length_U, values = np.diff(column.offsets.to_numpy()), column.flatten().to_numpy(zero_copy_only=False)
    width = int(length_U.max(initial=0))
    if values.dtype.kind == "f":
        if len(set(length_U.tolist())) > 1:
            raise ValueError(f"column {name!r} has vectors of different widths")
        return np.asarray(values).reshape(len(length_U), width)
    padded_UL = np.zeros((len(length_U), width), np.int64)
    padded_UL[np.arange(width)[None, :] < length_U[:, None]] = values
    return padded_UL


def _wrong(what: str) -> ValueError:
    return ValueError(f"{what}; an audit needs {SCHEMA}")
