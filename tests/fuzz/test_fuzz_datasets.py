"""Datasets of a stranger, mutated at random: tars, manifests and tables are read, or refused in one line.

`corpus/datasets` has the files that once ended in something else.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated

from shards.manifest import DatasetError, file_sha256, read_manifest
from shards.stored.users import read_stored
from trainer.data.raw.users import find_users
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_shards
from trainer.workflows.audit.arrays import read_arrays

CORPUS = Path(__file__).parent / "corpus" / "datasets"
bounded = settings(
    deadline=None, max_examples=int(os.environ.get("FUZZ", "60")), derandomize="FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck), database=None,
)  # fmt: skip
TAR = "shard-000000.tar"


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    return shutil.copytree(world, tmp_path / "dataset")


def read_everything(folder: Path) -> None:
    """Everything that training and statistics read of a dataset."""
    manifest = read_manifest(folder)
    dataset = open_dataset(folder, full_check=True, manifest=manifest)
    read_shards(folder, manifest, range(len(manifest.shards)))
    assert sum(len(users.user_U) for users in read_stored(folder, manifest)) == manifest.num_users
    dataset.candidates_of("retrieval", "test", dataset.candidates("retrieval", "test")[:1, 0] * 0)
    find_users(folder, ["u1"])


def check(folder: Path, name: str, content: bytes, *, honest: bool = False) -> None:
    """Read the dataset with another content of one file.

    Args:
        honest: leave the manifest as it was; else it gets the file's size and hash, as a stranger would write them.
    """
    before = (folder / name).read_bytes(), (folder / "manifest.json").read_bytes()
    (folder / name).write_bytes(content)
    if name != "manifest.json" and not honest:
        listed = json.loads(before[1])
        [entry] = [entry for entry in (*listed["shards"], *listed["files"]) if entry["name"] == name]
        entry |= {"bytes": len(content), "sha256": file_sha256(folder / name)}
        (folder / "manifest.json").write_text(json.dumps(listed))
    said = str(folder)
    try:
        read_everything(folder)
    except DatasetError as error:
        said = str(error)
    except BaseException:
        if keep := os.environ.get("FUZZ_KEEP"):
            Path(keep, f"{name.replace('/', '+')}-{hash(content) & 0xFFFFFF:06x}").write_bytes(content)
        raise
    finally:
        (folder / name).write_bytes(before[0])
        (folder / "manifest.json").write_bytes(before[1])
    assert str(folder) in said or "the dataset" in said


FILES = [TAR, "manifest.json", "catalog.parquet", "users.parquet", "candidates/retrieval-test.npy"]


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file(copied: Path, name: str) -> None:
    @bounded
    @given(mutated((copied / name).read_bytes()))
    def run(content: bytes) -> None:
        check(copied, name, content)

    run()
    read_everything(copied)


def records(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]


def packed(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def test_a_mutated_record_in_an_intact_tar(copied: Path) -> None:
    found = records(copied / TAR)
    first, rest = min(found), [(tarfile.TarInfo(name), content) for name, content in sorted(found.items())[1:]]

    @bounded
    @given(mutated(found[first]))
    def run(content: bytes) -> None:
        check(copied, TAR, packed([(tarfile.TarInfo(first), content), *rest]))

    run()


NAMES = ["../../x.arrow", "/tmp/x.arrow", "a/../../b.arrow", "00000000.arrow/x", "pipe:id", "x\n.arrow", "\udc80.arrow"]
KINDS = [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
    tarfile.GNUTYPE_SPARSE, b"Z",
]  # fmt: skip


@bounded
@given(st.sampled_from(["00000000.arrow", *NAMES]), st.sampled_from([tarfile.REGTYPE, *KINDS]), st.sampled_from(NAMES))
def test_members_of_any_name_and_kind(world: Path, name: str, kind: bytes, link: str) -> None:
    """Nothing is written anywhere, and nothing outside the tar is read: a member is a record or the end."""
    folder = world.parent / "members"
    if not folder.exists():
        shutil.copytree(world, folder)
    found = sorted(records(folder / TAR).items())
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.devmajor = kind, link, 1
    outside = set(world.parent.iterdir()), set(Path("/tmp").glob("x.arrow*"))
    own = (member, found[0][1] if kind == tarfile.REGTYPE else b"")
    content = packed([own, *((tarfile.TarInfo(name), record) for name, record in found[1:])])
    check(folder, TAR, content)
    assert (set(world.parent.iterdir()), set(Path("/tmp").glob("x.arrow*"))) == outside


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("name", NAMES[:3])
def test_members_that_are_no_records_are_refused(copied: Path, name: str, kind: bytes) -> None:
    for case in (tarfile.REGTYPE, kind):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = case, "/etc/passwd"
        (copied / TAR).write_bytes(packed([(member, b"x" if case == tarfile.REGTYPE else b"")]))
        with pytest.raises(DatasetError, match=r"cannot be read .*(is not a plain file|is not the name of a record)"):
            read_shards(copied, read_manifest(copied), [0])


def _nested(depth: int) -> Callable[[str], str]:
    return lambda text: text[:-2].rstrip() + ', "x": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    "change", [_nested(10_000), lambda text: "[" * 100_000, lambda text: text.replace("1", "9" * 5000)]
)
def test_a_manifest_that_is_hard_to_parse(copied: Path, change: Callable[[str], str]) -> None:
    manifest = copied / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(DatasetError, match=r"manifest\.json is damaged"):
        read_manifest(copied)


def test_an_archive_of_arrays_whose_header_is_no_python(tmp_path: Path) -> None:
    """As the candidates in the corpus, but in an npz with right checksums."""
    header = (CORPUS / "candidates+retrieval-test.npy-unclosed").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("user_vectors.npy", header)
    with pytest.raises(ValueError, match=r"x\.npz cannot be read"):
        read_arrays([tmp_path / "x.npz"], "x")


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*")), ids=lambda file: file.name)
def test_files_that_once_failed(copied: Path, file: Path) -> None:
    check(copied, file.name.rpartition("-")[0].replace("+", "/"), file.read_bytes())
