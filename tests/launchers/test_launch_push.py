"""`export.py --push` against a hub on this machine, which speaks the hub's protocol for small files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from launch_helpers import Refused, contents

from launchers import export

pytestmark = pytest.mark.process

TOKEN = "hf_ours"


class Hub(BaseHTTPRequestHandler):
    """Creates repositories and takes commits of files inside the request, from whoever has the token."""

    created: list[dict[str, Any]]
    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._answer(200, {"url": f"http://{self.headers['host']}/shop/sasrec"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            parts = [entry["value"] for entry in entries if entry["key"] == "file"]
            self.files.update({part["path"]: base64.b64decode(part["content"]) for part in parts})
            self._answer(200, {"commitUrl": f"http://{self.headers['host']}/shop/sasrec/commit/1", "commitOid": "1"})
        else:
            self._answer(404, {"error": self.path})

    def _answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Be quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("OwnHub", (Hub,), {"created": [], "files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(teacher: Path, tmp_path: Path) -> Path:
    export.main([str(teacher), str(tmp_path / "export")])
    return tmp_path / "export"


def test_a_push_uploads_every_file(hub: type[Hub], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export.main([str(folder), "--push", "shop/sasrec", "--dry-run"])
    listed = [line.split()[-1] for line in capfd.readouterr().out.splitlines()[1:]]
    assert (hub.created, hub.files) == ([], {}), "a dry run pushes nothing"
    assert listed == sorted(contents(folder))
    export.main([str(folder), "--push", "shop/sasrec"])
    assert hub.files == contents(folder)
    [repository] = hub.created
    assert (repository["name"], repository["organization"]) == ("sasrec", "shop")
    assert repository.get("private") is True or repository.get("visibility") == "private"


def test_the_hub_refuses(
    hub: type[Hub], folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = refused(export.main, folder, "--push", "shop/sasrec", HF_TOKEN="hf_another")
    assert "the hub refused shop/sasrec (HTTP 401)" in line
    assert "set HF_TOKEN to a token that may write there" in line
    assert hub.files == {}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in refused(export.main, folder, "--push", "shop/sasrec")
