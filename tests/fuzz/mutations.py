"""Mutations of valid files, for fuzzing: what a damaged disk, a careless script or an attacker makes of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TOKENS: list[bytes] = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"'", b",", b"\t", b"::", b";", b"{", b"}",
    b"[" * 200, b'{"a":' * 200, b"null", b"NaN", b"Infinity", b"-1", b"1e400", b"9" * 40, b"0x10", b"true",
    b"\\ud800", b"\\u0000", b"<script>", b"&#0;", b"../../x", b"/etc/passwd", b"pipe:id", b"\xed\xa0\x80",
    b"x" * 5000, b"1970-01-01", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"PAR1", "\u202e\u200b".encode(), b"%n%s",
    b"$(id)", b"`id`",
]  # fmt: skip
"""Pieces that parsers have tripped over."""


@st.composite
def mutated(draw: Any, valid: bytes) -> bytes:
    """`valid` with one to four pieces replaced, doubled, dropped or cut off, or bytes flipped."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 2, 7, 30, 512]))
        kind = draw(st.sampled_from(["token", "token", "token", "bytes", "drop", "double", "cut", "flip"]))
        if kind == "token":
            content[place : place + min(length, 30)] = draw(st.sampled_from(TOKENS))
        elif kind == "bytes":
            content[place : place + length] = draw(st.binary(max_size=20))
        elif kind == "drop":
            del content[place : place + length]
        elif kind == "double":
            content[place:place] = content[place : place + length]
        elif kind == "cut":
            del content[place:]
        elif place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)
