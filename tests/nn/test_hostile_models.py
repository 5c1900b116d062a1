"""A folder of a language model that comes from anyone: nothing in it is run, nothing outside it is read, no question is
asked, and each refusal is one line."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file

from trainer.config import EncoderConfig, LLMConfig
from trainer.nn.llm.backbone import check_llm, load_llm, load_tokenizer
from trainer.nn.pretrained import LLMError
from trainer.nn.text_encoder import encoder_width, load_encoder_tokenizer


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that hostile code would write. Questions on stdin are answered with yes."""
    monkeypatch.setattr("builtins.input", lambda question: "y")
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code in the folder was run"


@pytest.fixture
def llm(tmp_path: Path, tiny_llm: Path) -> Path:
    return shutil.copytree(tiny_llm, tmp_path / "llm")


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def code(folder: Path, ran: Path) -> None:
    text = f"""
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
open({str(ran)!r}, "w").close()
class Config(PretrainedConfig): model_type = "own"
class Model(PreTrainedModel): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
    (folder / "own.py").write_text(text)


AUTO = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}


def refused(load: Callable[[], object], words: str) -> None:
    with pytest.raises(LLMError, match=words) as caught:
        load()
    assert "set system." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_an_unknown_architecture_is_never_run(llm: Path, ran: Path) -> None:
    code(llm, ran)
    change(llm / "config.json", model_type="own", auto_map=AUTO)
    refused(lambda: check_llm(LLMConfig(path=str(llm))), "needs Python code .* never run; set system.llm.path")
    refused(lambda: encoder_width(EncoderConfig(path=str(llm))), "needs Python code .* never run; set system.encoder")


def test_code_of_a_known_architecture_is_not_used(llm: Path, ran: Path) -> None:
    """Some models on the hub come with the code that transformers has taken over since."""
    code(llm, ran)
    change(llm / "config.json", auto_map=AUTO)
    load_llm(LLMConfig(path=str(llm), dtype="float32"))


def test_code_of_a_tokenizer_is_never_run(llm: Path, ran: Path) -> None:
    code(llm, ran)
    auto = {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
    change(llm / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto)
    # Refused, or loaded with a class of transformers, where there is one for the model.
    with contextlib.suppress(LLMError):
        load_tokenizer(LLMConfig(path=str(llm)))
    with contextlib.suppress(LLMError):
        load_encoder_tokenizer(EncoderConfig(path=str(llm)))


def test_every_call_refuses_code() -> None:
    """Without the argument transformers asks on stdin, and runs the code after a y."""
    files = [
        file for name in ("trainer", "launchers", "benchmarks", "examples") for file in (ROOT / name).rglob("*.py")
    ]
    calls = [
        (file, call)
        for file in files
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(calls) > 5
    for file, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("trust_remote_code")
        assert isinstance(value, ast.Constant), f"{file}:{call.lineno}"
        assert value.value is False, f"{file}:{call.lineno}"


class Touch:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))])
def test_no_pickle_is_run(llm: Path, ran: Path, write: Callable[[Any, Path], None]) -> None:
    weights = load_file(llm / "model.safetensors") | {"x": Touch(ran)}
    (llm / "model.safetensors").unlink()
    write(weights, llm / "pytorch_model.bin")
    refused(lambda: load_llm(LLMConfig(path=str(llm))), "cannot load the weights")


def test_no_template_is_run(llm: Path, ran: Path) -> None:
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    (llm / "chat_template.jinja").write_text(attack)
    change(llm / "tokenizer_config.json", chat_template=attack)
    load_tokenizer(LLMConfig(path=str(llm)))


def test_an_adapter_does_not_lead_elsewhere(llm: Path, tiny_llm: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_llm), "target_modules": ["q_proj"]}
    (llm / "adapter_config.json").write_text(json.dumps(adapter))
    refused(lambda: check_llm(LLMConfig(path=str(llm))), "is beside its weights .adapter_config.json")


@pytest.mark.parametrize("name", ["../llm2/model.safetensors", "/tmp/model.safetensors", "a/b.safetensors", 3])
def test_an_index_does_not_lead_elsewhere(llm: Path, name: object) -> None:
    (llm / "model.safetensors").rename(llm.parent / "model.safetensors")
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed_tokens.weight": name}}))
    refused(lambda: check_llm(LLMConfig(path=str(llm))), "which is not a file in the folder")


def test_attention_does_not_come_from_the_hub(llm: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    encoder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    change(encoder / "config.json", attn_implementation="someone/attention")
    refused(lambda: encoder_width(EncoderConfig(path=str(encoder))), r"code from the hub \(someone/attention\)")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "content",
    [DEEP, f'{{"model_type": "llama", "x": {DEEP}}}', "[]", "3", "", '{"model_type": []}', "\ud800",
     '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": "llama", "num_attention_heads": 0}'],
)  # fmt: skip
def test_settings_that_are_none(llm: Path, content: str) -> None:
    (llm / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(lambda: check_llm(LLMConfig(path=str(llm))), "config.json|is not a language model|llm holds")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [DEEP, "[]", "{", '{"added_tokens": 3}', '{"added_tokens_decoder": 3}'])
def test_tokenizers_that_are_none(llm: Path, name: str, content: str) -> None:
    (llm / name).write_text(content)
    with contextlib.suppress(LLMError):  # what transformers does not read does no harm
        load_tokenizer(LLMConfig(path=str(llm)))


def test_weights_that_are_none(llm: Path) -> None:
    (llm / "model.safetensors").write_bytes(b"\xff" * 100)
    refused(lambda: load_llm(LLMConfig(path=str(llm))), "cannot load the weights")
