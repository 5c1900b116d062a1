"""Folders that are given as a language model: each is named as what it is, by names and small files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from trainer.config import ConfigError
from trainer.runs.model_folder import check_encoder_path, check_llm_path, folder_problem, quantization_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 9085657\n"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "models/base", "target_modules": ["q_proj"]}
AUTO = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
GGUF = b"GGUF\x03\0\0\0" + bytes(64)


def model(folder: Path, **settings: Any) -> Path:
    """The files of a model, which only loading would find to be empty."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | settings))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(2000))
    return folder


def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for name in names:
        (folder / name).write_bytes(bytes(2000))
    index = {"weight_map": {f"layers.{n}.weight": name for n, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def moved(folder: Path, to: Path) -> Path:
    """The folder in another place, as the hub's cache keeps it."""
    to.parent.mkdir(parents=True)
    folder.rename(to)
    return to


def test_models_are_accepted(tmp_path: Path) -> None:
    llm = model(tmp_path / "my llm (v2) #1")
    assert folder_problem(llm) is None
    assert folder_problem(sharded(llm)) is None
    for name in ("tokenizer.model", "vocab.txt", "qwen.tiktoken"):
        shutil.move(next(path for path in llm.iterdir() if path.name.startswith(("tok", "vocab"))), llm / name)
        assert folder_problem(llm) is None
    old = model(tmp_path / "old")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    check_llm_path(str(old))
    # Some models still come with the code that transformers has taken over since.
    assert folder_problem(model(tmp_path / "phi", model_type="phi3", auto_map=AUTO)) is None
    assert folder_problem(model(tmp_path / "text", model_type="gemma3_text", auto_map=AUTO)) is None


Change = Callable[[Path], object]


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, content: str | bytes, *, without: tuple[str, ...] = ()) -> Change:
    def change(folder: Path) -> None:
        remove(*without)(folder)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def adapted(*, config: bool, weights: bool) -> Change:
    def change(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
        (folder / "adapter_model.safetensors").write_bytes(bytes(2000))
        remove(*["config.json"] * (not config), *["model.safetensors"] * (not weights))(folder)

    return change


def quantized(**settings: Any) -> Change:
    return write("config.json", json.dumps({"model_type": "llama", "quantization_config": settings}))


CASES: dict[str, tuple[Change, str]] = {
    "pointer to weights": (write("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer, not the file"),
    "pointer to a tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "pointer to a SentencePiece model": (
        write("tokenizer.model", POINTER, without=("tokenizer.json",)), "run `git lfs pull` in the folder",
    ),
    "adapter alone": (adapted(config=False, weights=False), "it is an adapter alone of 'models/base': merge it"),
    "adapter with its model's config": (
        adapted(config=True, weights=False), "it is an adapter of 'models/base' (adapter_config.json): merge it",
    ),
    "adapter beside merged weights": (
        adapted(config=True, weights=True),
        "an adapter of 'models/base' is beside its weights (adapter_config.json), and would be applied to them",
    ),
    "GGUF alone": (
        write("model-q4_k_m.gguf", GGUF, without=("config.json", "tokenizer.json", "model.safetensors")),
        "its weights are in a GGUF file, which is not read: convert it once, `llm-srec convert-gguf",
    ),
    "GGUF beside a config": (write("model.gguf", GGUF, without=("model.safetensors",)), "are in a GGUF file"),
    "the maker's layout": (
        write("params.json", "{}", without=("config.json",)), "in the layout of its maker (params.json, consolidated",
    ),
    "no config": (remove("config.json"), "it has no config.json; set"),
    "a shard missing": (
        lambda folder: (sharded(folder) / "model-00002-of-00003.safetensors").unlink(),
        "model-00002-of-00003.safetensors is missing (1 of 3 files in model.safetensors.index.json): copy it again",
    ),
    "index missing": (
        lambda folder: (sharded(folder) / "model.safetensors.index.json").unlink(),
        "model.safetensors.index.json is missing, without which its 3 files of weights are not read",
    ),
    "index of something else": (write("model.safetensors.index.json", "[]"), "index.json is damaged"),
    "index out of the folder": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
        "names '../x.safetensors', which is not a file in the folder",
    ),
    "a link to nothing": (
        lambda folder: (folder / "extra.safetensors").symlink_to(folder / "blob"),
        "extra.safetensors is a link to a file that does not exist",
    ),
    "no weights": (remove("model.safetensors"), "it has no weights; set"),
    "weights of TensorFlow": (
        write("tf_model.h5", "x", without=("model.safetensors",)), "it has no weights that are read (not tf_model.h5)",
    ),
    "no tokenizer": (remove("tokenizer.json"), "it has no tokenizer (no tokenizer.json or tokenizer.model)"),
    "tekken": (
        write("tekken.json", "{}", without=("tokenizer.json",)), "its only tokenizer is tekken.json, which is not read",
    ),
    "vocabulary without merges": (
        write("vocab.json", "{}", without=("tokenizer.json",)), "has vocab.json, but merges.txt is missing",
    ),
    "own code": (
        write("config.json", json.dumps({"model_type": "homegrown_lm", "auto_map": AUTO})),
        "it needs Python code that comes with it (`auto_map`), and such code is never run; set",
    ),
    "own code with a name to look up elsewhere": (
        write("config.json", json.dumps({"model_type": "../models/llama", "auto_map": AUTO})), "needs Python code",
    ),
    **{
        method: (quantized(quant_method=method, bits=4), f"its weights are quantized ({method}), and of quantized")
        for method in ("gptq", "awq", "fp8", "compressed-tensors", "mxfp4")
    },
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CASES.values(), ids=CASES)
def test_a_folder_is_named_as_what_it_is(tmp_path: Path, change: Change, said: str) -> None:
    llm = model(tmp_path / "llm")
    change(llm)
    for check, key in ((check_llm_path, "system.llm.path"), (check_encoder_path, "system.encoder.path")):
        with pytest.raises(ConfigError) as caught:
            check(str(llm))
        message = str(caught.value)
        assert said in message
        assert message.startswith(f"{key}={llm} is not a ")
        assert f"set {key} to a folder with config.json, safetensors weights and a tokenizer" in message
        assert "\n" not in message


def test_the_hub_cache_is_named_with_the_folder_to_give(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--meta-llama--Llama-3.2-1B"
    snapshot = moved(model(tmp_path / "llm"), cache / "snapshots" / "0123abc")
    check_llm_path(str(snapshot))
    for folder in (cache, cache.parent):
        assert folder_problem(folder) == f"it is a cache of the Hugging Face hub, the model is in {snapshot}"
    shutil.rmtree(cache / "snapshots" / "0123abc")
    assert folder_problem(cache) == "it is a cache of the Hugging Face hub, and the model was never downloaded"


def test_a_folder_around_the_model_is_named(tmp_path: Path) -> None:
    inside = model(tmp_path / "llm")
    assert folder_problem(tmp_path) == f"it has no config.json, but {inside} has one"


@pytest.mark.parametrize(
    "content", ["[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "\xff", "3", "9" * 5000]
)
def test_files_that_hold_anything_are_left_to_loading(tmp_path: Path, content: str) -> None:
    llm = model(tmp_path / "llm")
    (llm / "config.json").write_bytes(content.encode("latin-1"))
    assert folder_problem(llm) is None
    (llm / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    assert "model.safetensors.index.json is damaged" in str(folder_problem(llm))


def test_quantization_is_told_from_the_config(tmp_path: Path) -> None:
    assert quantization_of(tmp_path / "none") is None
    assert quantization_of(model(tmp_path / "llm")) is None
    for number, (settings, method) in enumerate(
        [({"quant_method": "gptq"}, "gptq"), ({"load_in_4bit": True}, "bitsandbytes"), ({}, "an unknown method")]
    ):
        assert quantization_of(model(tmp_path / str(number), quantization_config=settings)) == method


def test_nothing_is_imported_to_name_a_folder(tmp_path: Path) -> None:
    model(tmp_path / "llm", quantization_config={"quant_method": "gptq"}, auto_map=AUTO)
    code = (
        "import sys; from trainer.runs.model_folder import folder_problem; from pathlib import Path; "
        "print(folder_problem(Path(sys.argv[1]))); "
        "sys.exit(bool({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "llm")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "quantized (gptq)" in done.stdout
