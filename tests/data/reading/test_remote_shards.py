"""Shards that are read from an address, through a cache: a real server on this machine, and fsspec."""

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from shards.__main__ import main
from shards.build import BuildOptions, build
from shards.manifest import DatasetError, Manifest, check_sizes, read_manifest, verify
from shards.remote.fetch import fetch
from shards.remote.linked import CACHE_NAME, Prefetch, held_shard, link_dataset
from shards.stored.users import read_stored
from shards.synthetic import write_world
from trainer.data.reading.shards import epoch_batches, read_in_order, read_users

SHARDS = 7


@dataclass
class Site:
    """Serves a folder; `failures` are HTTP codes of the next answers, `asked` the paths of all requests."""

    folder: Path
    address: str = ""
    failures: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers with the files of a folder, or fails as told."""

    def __init__(self, site: Site, *arguments: object) -> None:
        self.site = site
        super().__init__(*arguments, directory=str(site.folder))  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer one request."""
        self.site.asked.append(self.path)
        if self.site.failures:
            self.send_error(self.site.failures.pop(0))
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay silent."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    reviews, items = write_world(folder, users=400, items=40)
    build(folder / "data", BuildOptions("table", (reviews,), "world", (items,), shards=SHARDS, negatives=9))
    return folder / "data"


@pytest.fixture
def site(tmp_path: Path, built: Path) -> Iterator[Site]:
    shutil.copytree(built, tmp_path / "site")
    site = Site(tmp_path / "site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, site))
    site.address = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.remote.linked.fetch", functools.partial(fetch, pause=0))


def linked(site: Site, tmp_path: Path, cache_bytes: int = 10**9, name: str = "linked") -> tuple[Path, Manifest]:
    manifest = link_dataset(site.address, tmp_path / name, cache_bytes=cache_bytes)
    return tmp_path / name, manifest


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / CACHE_NAME).glob("*.tar"))


def order(folder: Path, manifest: Manifest, first_step: int = 0) -> list[list[int]]:
    """Users and items of each batch of an epoch."""
    batches = epoch_batches(folder, manifest, batch_size=32, shuffle_shards=3, seed=1, epoch=2, first_step=first_step)
    return [[*users.train.user_U.tolist(), *users.train.item_E.tolist()] for users in batches]


def test_the_order_is_that_of_a_local_dataset_also_when_resuming(site: Site, tmp_path: Path, built: Path) -> None:
    folder, manifest = linked(site, tmp_path)
    assert manifest.fingerprint == read_manifest(built).fingerprint
    check_sizes(folder, manifest)
    verify(folder, manifest)
    assert not any("shard" in path for path in site.asked)
    expected = order(built, manifest)
    assert order(folder, manifest, first_step=4) == expected[4:]
    assert order(folder, manifest) == expected
    fetched = [path for path in site.asked if path.endswith(".tar")]
    assert sorted(fetched) == sorted(f"/{shard.name}" for shard in manifest.shards)  # each once
    assert order(folder, manifest) == expected
    assert len(fetched) == len([path for path in site.asked if path.endswith(".tar")])
    user = read_users(folder, manifest, np.array([123])).whole()
    assert user.item_E.tolist() == read_users(built, manifest, np.array([123])).whole().item_E.tolist()
    all_users = np.concatenate([users.user_U for users in read_stored(folder, manifest)])
    assert all_users.tolist() == list(range(manifest.num_users))


def test_the_cache_stays_within_its_bound(site: Site, tmp_path: Path, built: Path) -> None:
    sizes = sorted(shard.bytes for shard in read_manifest(built).shards)
    folder, manifest = linked(site, tmp_path, cache_bytes=sum(sizes[-2:]))
    for _ in range(2):
        assert order(folder, manifest) == order(built, manifest)
    read = np.concatenate([users.train.user_U for users in read_in_order(folder, manifest, group=2)])
    assert read.tolist() == list(range(manifest.num_users))
    assert 1 <= len(cached(folder)) <= 3  # one more than fits while it is fetched in a thread


def test_a_shard_in_use_is_not_removed(site: Site, tmp_path: Path, built: Path) -> None:
    largest = max(shard.bytes for shard in read_manifest(built).shards)
    folder, manifest = linked(site, tmp_path, cache_bytes=largest)
    with held_shard(folder, manifest.shards[0]) as first:
        with held_shard(folder, manifest.shards[1]):
            assert cached(folder) == ["shard-000000.tar", "shard-000001.tar"]
        with held_shard(folder, manifest.shards[2]):
            assert first.exists()
            assert cached(folder) == ["shard-000000.tar", "shard-000002.tar"]
    with held_shard(folder, manifest.shards[3]):
        assert cached(folder) == ["shard-000003.tar"]


def test_prefetched_shards_are_not_fetched_again(site: Site, tmp_path: Path) -> None:
    folder, manifest = linked(site, tmp_path)
    prefetch = Prefetch(folder)
    prefetch.start(manifest.shards[:3])
    for thread in threading.enumerate():
        if thread.name == "shards":
            thread.join(60)
    assert cached(folder) == [shard.name for shard in manifest.shards[:3]]
    site.failures = [503] * 99
    with held_shard(folder, manifest.shards[1]) as path:
        assert path.stat().st_size == manifest.shards[1].bytes


def test_failures_are_retried_and_the_lost_and_changed_are_named(site: Site, tmp_path: Path) -> None:
    folder, manifest = linked(site, tmp_path)
    site.failures = [503, 500, 429]
    expected = order(site.folder, manifest)
    assert order(folder, manifest) == expected
    lost, changed = site.folder / "shard-000002.tar", site.folder / "shard-000004.tar"
    content = bytearray(changed.read_bytes())
    content[1500] ^= 1
    changed.write_bytes(content)
    folder, manifest = linked(site, tmp_path, name="changed")
    with pytest.raises(DatasetError, match=r"shard-000004.tar has sha256 .*, not .*, twice"):
        order(folder, manifest)
    assert "shard-000004.tar" not in cached(folder)
    lost.unlink()
    folder, manifest = linked(site, tmp_path, name="lost")
    with pytest.raises(DatasetError, match=rf"{site.address}/shard-000002.tar cannot be fetched \(HTTP 404"):
        read_users(folder, manifest, np.array([manifest.shards[2].first_user]))


_HOLDING = """
import sys
from pathlib import Path
from shards.manifest import file_sha256, read_manifest
from shards.remote.fetch import fetch
from shards.remote.linked import held_shard
folder, step = Path(sys.argv[1]), int(sys.argv[2])
shards = read_manifest(folder).shards
for place in range(40):
    entry = shards[place * step % len(shards)]
    with held_shard(folder, entry) as path:
        assert file_sha256(path) == entry.sha256
"""


@pytest.mark.process
def test_processes_share_a_small_cache(site: Site, tmp_path: Path, built: Path) -> None:
    sizes = sorted(shard.bytes for shard in read_manifest(built).shards)
    folder, manifest = linked(site, tmp_path, cache_bytes=sum(sizes[-3:]))
    processes = [subprocess.Popen([sys.executable, "-c", _HOLDING, folder, str(step)]) for step in (1, 2, 3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert (
        sum((folder / CACHE_NAME / name).stat().st_size for name in cached(folder)) <= sum(sizes[-3:]) + 3 * sizes[-1]
    )
    assert order(folder, manifest) == order(built, manifest)


def test_other_addresses_through_fsspec(tmp_path: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(built, tmp_path / "bucket")
    folder = tmp_path / "linked"
    address = f"file://{tmp_path / 'bucket'}"
    assert main(["link", address, str(folder), "--cache-gb", "0.1"]) == 0
    manifest = read_manifest(folder)
    assert order(folder, manifest) == order(built, manifest)
    shutil.rmtree(folder / CACHE_NAME)
    (tmp_path / "bucket/shard-000003.tar").unlink()
    with pytest.raises(DatasetError, match=r"file://.*/shard-000003.tar cannot be fetched"):
        order(folder, manifest)
    assert main(["link", address, str(folder)]) == 2
    assert "give a different folder" in capsys.readouterr().err
    assert main(["link", address, str(tmp_path / "small"), "--cache-gb", "1e-9"]) == 2
    assert "cannot hold a shard" in capsys.readouterr().err
    assert main(["link", "nosuch://place", str(tmp_path / "none")]) == 2
    assert "install what reads such addresses" in capsys.readouterr().err


def test_an_interrupted_link_resumes(site: Site, tmp_path: Path) -> None:
    candidates = site.folder / "candidates/title-test.npy"
    candidates.rename(tmp_path / "away")
    with pytest.raises(DatasetError, match=r"title-test.npy cannot be fetched"):
        linked(site, tmp_path)
    with pytest.raises(DatasetError, match="is not a dataset"):
        read_manifest(tmp_path / "linked")
    (tmp_path / "away").rename(candidates)
    site.asked.clear()
    folder, manifest = linked(site, tmp_path)
    assert site.asked == ["/manifest.json", "/candidates/title-test.npy"]
    assert order(folder, manifest) == order(site.folder, manifest)
