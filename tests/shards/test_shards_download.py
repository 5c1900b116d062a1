"""Downloads from a local server that cuts connections, forgets, fails and lies."""

import hashlib
import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shards.manifest import DatasetError
from shards.paper.datasets import PAPER_DATASETS, raw_files
from shards.remote.download import download

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does: the answers of its next requests, one word each (then it serves), and what it was asked."""

    address: str = ""
    answers: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tag: str | None = SHA256
    ranges_work: bool = True


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT at any path; `/old` redirects to `/new` and names the hash there alone, as the hub does."""

    site: Site

    def do_GET(self) -> None:
        """Answer one request."""
        self.site.ranges.append(self.headers["Range"])
        answer = self.site.answers.pop(0) if self.site.answers else "serve"
        if answer.isdigit():
            self.send_error(int(answer))
            return
        if self.path == "/old":
            self.send_response(302)
            self.send_header("Location", "http://example.com/new" if answer == "leave" else "/new")
            self.send_header("X-Linked-ETag", f'"{SHA256}"')
            self.end_headers()
            return
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.site.ranges_work else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
        else:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
        if self.site.tag and self.path != "/new":
            self.send_header("X-Linked-ETag", f'"{self.site.tag}"')
        self.end_headers()
        content = CONTENT[start:]
        if answer == "damage":
            content = bytes(len(content))
        self.wfile.write(content[:4000] if answer == "cut" else content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay silent."""


def serving(site: Site, context: ssl.SSLContext | None = None) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"site": site}))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    site.address = f"http{'s' if context else ''}://localhost:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def site() -> Iterator[Site]:
    here = Site()
    server = serving(here)
    yield here
    server.shutdown()
    server.server_close()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_cut_connections_are_resumed(site: Site, tmp_path: Path) -> None:
    site.answers = ["cut", "503", "cut", "429"]
    path = tmp_path / "new/x.csv"
    download(f"{site.address}/x.csv", path, pause=0.001)
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == ["x.csv"]
    assert site.ranges == [f"bytes={at}-" for at in (0, 4000, 4000, 8000, 8000)]
    download(f"{site.address}/x.csv", path)
    assert len(site.ranges) == 5  # a file that is there is not asked for


def test_a_later_command_resumes_and_a_whole_part_needs_nothing(site: Site, tmp_path: Path) -> None:
    for have in (1000, len(CONTENT)):
        path = tmp_path / f"{have}.csv"
        path.with_name(path.name + ".part").write_bytes(CONTENT[:have])
        download(f"{site.address}/x.csv", path)
        assert path.read_bytes() == CONTENT
    assert site.ranges == ["bytes=1000-", f"bytes={len(CONTENT)}-"]


def test_a_server_without_ranges_starts_anew(site: Site, tmp_path: Path) -> None:
    site.ranges_work, site.answers = False, ["cut"]
    download(f"{site.address}/x.csv", tmp_path / "x.csv", pause=0.001)
    assert (tmp_path / "x.csv").read_bytes() == CONTENT


def test_damage_is_fetched_again_once(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.csv.part").write_bytes(b"of an earlier version")
    download(f"{site.address}/x.csv", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == CONTENT
    assert site.ranges == ["bytes=21-", "bytes=0-"]
    site.answers = ["damage", "damage"]
    with pytest.raises(DatasetError, match=rf"not {SHA256}, twice: fetch y\.csv from elsewhere"):
        download(f"{site.address}/y.csv", tmp_path / "y.csv")
    assert left(tmp_path) == ["x.csv"]


def test_the_hash_in_a_redirect_counts(site: Site, tmp_path: Path) -> None:
    site.answers = ["serve", "damage"]
    download(f"{site.address}/old", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == CONTENT
    assert len(site.ranges) == 4


def test_failures_that_stay(site: Site, tmp_path: Path) -> None:
    site.answers = ["404"]
    with pytest.raises(DatasetError, match=r"/x\.csv cannot be fetched \(HTTP 404 Not Found\): check it"):
        download(f"{site.address}/x.csv", tmp_path / "x.csv")
    site.answers = ["cut", "500", "500"]
    with pytest.raises(DatasetError, match=r"3 times in a row: run the command again to resume at x\.csv\.part"):
        download(f"{site.address}/x.csv", tmp_path / "x.csv", tries=3, pause=0.001)
    assert left(tmp_path) == ["x.csv.part"]
    for address in ("http://example.com/x", "ftp://localhost/x", "file:///etc/passwd"):
        with pytest.raises(DatasetError, match="is not an https address"):
            download(address, tmp_path / "y.csv")
    site.answers = ["leave"]
    with pytest.raises(DatasetError, match=r"http://example\.com/new is not an https address"):
        download(f"{site.address}/old", tmp_path / "y.csv")


def test_missing_files_of_a_dataset_are_fetched(site: Site, tmp_path: Path) -> None:
    dataset = PAPER_DATASETS["cds"]
    (tmp_path / "CDs_and_Vinyl.test.csv.gz").write_bytes(b"here already")
    reviews, [meta] = raw_files(dataset, tmp_path, download_from=f"{site.address}/mirror/")
    assert [path.name for path in reviews] == [
        "CDs_and_Vinyl.train.csv",
        "CDs_and_Vinyl.valid.csv",
        "CDs_and_Vinyl.test.csv.gz",
    ]
    assert meta.name == "meta_CDs_and_Vinyl.jsonl"
    assert len(site.ranges) == 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site = Site()
    server = serving(site, context)
    try:
        with pytest.raises(DatasetError, match="CERTIFICATE_VERIFY_FAILED"):
            download(f"{site.address}/x.csv", tmp_path / "x.csv", tries=1)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        download(f"{site.address}/x.csv", tmp_path / "x.csv", tries=1)
    finally:
        server.shutdown()
        server.server_close()
    assert (tmp_path / "x.csv").read_bytes() == CONTENT
