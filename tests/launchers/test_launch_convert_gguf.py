"""`launchers/convert_gguf.py`: what it refuses. `make quickstart` converts a real file in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_helpers import Refused

from launchers.convert_gguf import main


def test_what_cannot_be_converted_is_refused(tmp_path: Path, refused: Refused) -> None:
    text, empty, cut = tmp_path / "a.txt", tmp_path / "empty.gguf", tmp_path / "cut.gguf"
    text.write_text("not weights")
    empty.write_bytes(b"")
    cut.write_bytes(b"GGUF" + bytes(60))
    out = tmp_path / "out"
    assert "is not a file: give the GGUF file" in refused(main, tmp_path / "none.gguf", out)
    assert "is not a GGUF file: a folder with safetensors weights needs no conversion" in refused(main, text, out)
    assert "is not a GGUF file" in refused(main, empty, out)
    assert "exists: give a new folder" in refused(main, cut, tmp_path)
    pytest.importorskip("gguf")
    assert f"{cut} cannot be converted (" in refused(main, cut, out)
    assert not out.exists()
