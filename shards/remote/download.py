"""Fetches a file over https: resumes, retries, and checks size and sha256 before the file gets its name."""

import http.client
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO

from shards.manifest import DatasetError, file_sha256

log = logging.getLogger("shards")

_BLOCK = 1 << 20
_SECONDS_BETWEEN_REPORTS = 10.0
_TIMEOUT = 60.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Too many requests and request timeout; others of the client's errors stay errors however often one asks.
_WORTH_A_RETRY = (408, 425, 429)


def download(url: str, path: Path, *, sha256: str | None = None, tries: int = 6, pause: float = 1.0) -> None:
    """Fetch `url` to `path`; an existing file is left as it is, a part of one (`path.part`) is continued.

    Args:
        sha256: expected hash; None takes the one that the server names (`X-Linked-ETag`, as the Hugging Face hub does).
        tries: how often in a row it may fail without receiving anything.
        pause: seconds before the second try, doubled for each further one.

    Raises:
        DatasetError: the address is not https, does not exist, keeps failing, or serves other content than it should.
    """
    _check_address(url)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = damaged = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            named, size = _fetch(url, part)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in _WORTH_A_RETRY:
                raise DatasetError(f"{url} cannot be fetched (HTTP {error.code} {error.reason}): check it") from None
            if isinstance(error, OSError) and not isinstance(error, urllib.error.URLError) and error.filename:
                raise  # a problem of this machine's disk
            progress = part.exists() and part.stat().st_size > before
            failures = 1 if progress else failures + 1
            if failures >= tries:
                raise DatasetError(
                    f"{url} cannot be fetched ({error}), {failures} times in a row: run the command again to resume at "
                    f"{part.name}"
                ) from None
            log.info("note: %s: %s; trying again", path.name, error)
            time.sleep(pause * 2 ** (failures - 1))
            continue
        expected = sha256 or named
        found = file_sha256(part)
        if part.stat().st_size == size and expected in (None, found):
            break
        part.unlink()
        damaged += 1
        if damaged == 2:
            raise DatasetError(f"{url} has sha256 {found}, not {expected}, twice: fetch {path.name} from elsewhere")
        log.info("note: %s arrived damaged; fetching it again", path.name)
    part.rename(path)
    checked = "sha256 as the server says" if expected else "the server names no checksum"
    log.info("fetched %s: %s bytes, sha256 %s (%s)", path.name, f"{size:,}", found, checked)


def _fetch(url: str, part: Path) -> tuple[str | None, int]:
    """Append what is missing to `part`; returns the sha256 that the server names and the size of the whole file.

    Raises:
        OSError: the connection fails or ends early (and http.client's errors).
    """
    have = part.stat().st_size if part.exists() else 0
    redirects = _Redirects()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "Accept-Encoding": "identity"})
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code == 416 and total is not None and int(total[1]) <= have:  # nothing is missing
            return _named_sha256([*redirects.headers, error.headers]), int(total[1])
        raise
    with answer:
        resumed = answer.status == 206
        length = int(answer.headers.get("Content-Length") or 0)
        size = (have if resumed else 0) + length
        report = time.monotonic() + _SECONDS_BETWEEN_REPORTS
        with part.open("ab" if resumed else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                if time.monotonic() > report:
                    log.info("%s: %s of %s bytes", part.stem, f"{file.tell():,}", f"{size:,}")
                    report = time.monotonic() + _SECONDS_BETWEEN_REPORTS
    arrived = part.stat().st_size
    if length and arrived < size:
        raise ConnectionError(f"the connection ended at {arrived:,} of {size:,} bytes")
    return _named_sha256([*redirects.headers, answer.headers]), size or arrived


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only and keeps their headers: the hub names the hash in a redirect to its storage."""

    def __init__(self) -> None:
        self.headers: list[Message] = []

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The request for the new address.

        Raises:
            DatasetError: the new address is not https.
        """
        _check_address(newurl)
        self.headers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _named_sha256(headers: list[Message]) -> str | None:
    """The sha256 among the headers of all answers; other entity tags are no hashes."""
    tags = [str(header.get("X-Linked-ETag", "")).removeprefix("W/").strip('"') for header in headers]
    return next((tag for tag in tags if _SHA256.fullmatch(tag)), None)


def _check_address(url: str) -> None:
    """Check that an address is https, or on this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")):
        raise DatasetError(f"{url} is not an https address: give one that is")
