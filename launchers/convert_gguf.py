"""Convert a GGUF file to a folder in Hugging Face layout: `llm-srec convert-gguf FILE.gguf FOLDER [--dtype bfloat16]`.

Quantized weights become plain numbers again: the folder is as large as the exact model, no more exact than the file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command
from trainer.config import ConfigError

_MAGIC = b"GGUF"


def main(arguments: Sequence[str], prog: str = "convert_gguf.py") -> None:
    """Convert, and print the folder."""
    parser = CommandParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="a GGUF file with weights and tokenizer")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, for system.llm.path")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16")
    options = parser.parse_args(arguments)
    _check(options.file, options.folder)

    from trainer.nn.llm.gguf import convert  # imports torch

    convert(options.file, options.folder, options.dtype)
    print(options.folder)


def _check(file: Path, folder: Path) -> None:
    if not file.is_file():
        raise ConfigError(f"{file} is not a file: give the GGUF file")
    with file.open("rb") as start:
        if start.read(len(_MAGIC)) != _MAGIC:
            raise ConfigError(f"{file} is not a GGUF file: a folder with safetensors weights needs no conversion")
    if folder.exists():
        raise ConfigError(f"{folder} exists: give a new folder")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading GGUF files needs a package: pip install 'llm-srec-trainer[demo]'")


if __name__ == "__main__":
    exit_process(run_command(main))
