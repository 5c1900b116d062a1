import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from shards_helpers import options, world, write_amazon

from shards.build import build
from shards.manifest import (
    DatasetError,
    Manifest,
    check_sizes,
    read_manifest,
    verify,
    write_manifest,
)


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, Manifest]:
    reviews, meta = write_amazon(tmp_path, world())
    return tmp_path / "out", build(tmp_path / "out", options(reviews, meta, shards=3))


def change(directory: Path, **fields: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_round_trip(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    directory, manifest = built
    assert read_manifest(directory) == manifest
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (directory / "manifest.json").read_bytes()


def test_fingerprint_follows_every_field(built: tuple[Path, Manifest]) -> None:
    _, manifest = built
    shard = dataclasses.replace(manifest.shards[0], sha256="0" * 64)
    changed = [
        dataclasses.replace(manifest, name="other"),
        dataclasses.replace(manifest, shards=(shard, *manifest.shards[1:])),
        dataclasses.replace(manifest, build={**manifest.build, "seed": 1}),
    ]
    assert len({manifest.fingerprint, *(other.fingerprint for other in changed)}) == 4
    assert len(manifest.fingerprint) == 64


def test_catalog_sha256_is_that_of_the_catalog_file(built: tuple[Path, Manifest]) -> None:
    _, manifest = built
    assert manifest.catalog_sha256 == manifest.file("catalog.parquet").sha256
    with pytest.raises(DatasetError, match=r"no file .x\.npy"):
        manifest.file("x.npy")


def test_not_a_dataset(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DatasetError, match=r"is not a dataset.*python -m shards build"):
            read_manifest(directory)


def test_newer_schema(built: tuple[Path, Manifest]) -> None:
    change(built[0], schema=99, something_new=1)
    with pytest.raises(DatasetError, match=r"schema 99.*update"):
        read_manifest(built[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_users": "943"}, "num_users: Input should be a valid integer"),
        ({"num_users": True}, "num_users: Input should be a valid integer"),
        ({"num_users": 31}, "hold 30 users, not 31"),
        ({"statistics": {}}, r"statistics\.users: Field required"),
        ({"statistics": []}, "statistics: Input should be an object"),
        ({"shards": {}}, "shards: Input should be a valid array"),
        ({"shards": []}, "hold 0 users"),
        ({"build": 3}, "build: Input should be an object"),
        ({"schema": None}, "no schema number"),
        ({"users_per_record": 1}, "wrong number of records"),
        ({"files": []}, r"catalog\.parquet is not listed"),
        ({"num_items": 10**9}, r"catalog\.parquet is too small for 1000000000 items"),
        ({"num_items": 10**30}, "num_items is 100000000000000000000000000000, which is not between 1 and 2147483647"),
        ({"num_items": 0}, "num_items is 0"),
        ({"negatives": -1}, "negatives is -1"),
        ({"title_negatives": 29}, r"title-valid\.npy is too small for 29 items of 30 users"),
        ({"users_per_record": 10**20}, "users_per_record is 1"),
    ],
)
def test_damaged_fields(built: tuple[Path, Manifest], fields: dict[str, object], message: str) -> None:
    change(built[0], **fields)
    with pytest.raises(DatasetError, match=message):
        read_manifest(built[0])


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/b",
        "candidates/../x",
        "pipe:touch x",
        "http:x",
        "https://x/y",
        "s3:x",
        "-x",
        "a\\b",
        "a b",
        "",
        ".",
    ],
)
def test_a_name_that_is_not_that_of_a_file_in_the_folder(built: tuple[Path, Manifest], name: str) -> None:
    directory, manifest = built
    for kind in ("files", "shards"):
        entries = [dataclasses.asdict(entry) for entry in getattr(manifest, kind)]
        change(directory, **{kind: [{**entries[0], "name": name}, *entries[1:]]})
        with pytest.raises(DatasetError, match="is not the name of a file in the dataset folder"):
            read_manifest(directory)
        write_manifest(directory, manifest)


def test_a_file_that_is_listed_twice(built: tuple[Path, Manifest]) -> None:
    entries = [dataclasses.asdict(entry) for entry in built[1].files]
    change(built[0], files=[*entries, entries[0]])
    with pytest.raises(DatasetError, match=r"catalog\.parquet is listed twice"):
        read_manifest(built[0])


def test_impossible_statistics(built: tuple[Path, Manifest]) -> None:
    """The trainer computes bounds with them."""
    for field, value in (("max_length", -1), ("max_length", 2**63), ("mean_length", float("nan"))):
        change(built[0], statistics=dataclasses.asdict(built[1].statistics) | {field: value})
        with pytest.raises(DatasetError, match=f"{field} is "):
            read_manifest(built[0])


def test_json_that_is_nested_too_deeply(built: tuple[Path, Manifest]) -> None:
    (built[0] / "manifest.json").write_text('{"schema": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DatasetError, match=r"manifest.json is damaged .*nested too deeply.*rebuild"):
        read_manifest(built[0])


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe{}", b'{"schema": 1}'])
def test_damaged_json(built: tuple[Path, Manifest], content: bytes) -> None:
    (built[0] / "manifest.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"manifest.json.*copy the dataset again or rebuild"):
        read_manifest(built[0])


def test_every_file_is_listed_and_intact(built: tuple[Path, Manifest]) -> None:
    directory, manifest = built
    verify(directory, manifest)
    stored = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert stored == {entry.name for entry in manifest.entries} | {"manifest.json"}


@pytest.mark.parametrize("name", ["shard-000001.tar", "catalog.parquet", "candidates/title-test.npy"])
def test_a_flipped_bit_is_found_by_verify_only(built: tuple[Path, Manifest], name: str) -> None:
    directory, manifest = built
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    check_sizes(directory, manifest)
    with pytest.raises(DatasetError, match=f"{name} is damaged.*rebuild"):
        verify(directory, manifest)


def test_a_truncated_tar_and_a_missing_file_are_found_by_size(built: tuple[Path, Manifest]) -> None:
    directory, manifest = built
    tar = directory / manifest.shards[2].name
    tar.write_bytes(tar.read_bytes()[:1024])
    for check in (check_sizes, verify):
        with pytest.raises(DatasetError, match=r"shard-000002.tar has 1024 bytes, the manifest says \d+"):
            check(directory, manifest)
    (directory / "users.parquet").unlink()
    for check in (check_sizes, verify):
        with pytest.raises(DatasetError, match=r"users.parquet is missing"):
            check(directory, manifest)


def test_the_manifest_needs_only_the_standard_library() -> None:
    code = (
        "import sys, shards.manifest, shards.__main__;"
        "print(sorted({'numpy', 'polars', 'pyarrow', 'torch', 'webdataset'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_build_never_imports_the_trainers_libraries(tmp_path: Path) -> None:
    code = (
        "import sys, shards.build, shards.readers.demo, shards.statistics;"
        "print(sorted({'torch', 'transformers', 'webdataset', 'recbole', 'trainer'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
