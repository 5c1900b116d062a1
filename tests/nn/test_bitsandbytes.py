"""A folder whose weights bitsandbytes quantized to 4 bits: loaded, packed and differentiated like its exact weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import LLMConfig
from trainer.data.prompts.packing import pack
from trainer.nn.llm.backbone import FrozenLLM, llm_fingerprint, load_llm
from trainer.nn.llm.linear_layers import dequantized, quantized_layers
from trainer.nn.llm.packing_check import _prompts
from trainer.nn.pretrained import LLMError

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved as transformers saves a model that it loaded in 4 bits (QLoRA's NF4)."""
    from transformers import BitsAndBytesConfig

    path = tmp_path_factory.mktemp("nf4")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(path / "exact")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        path / "exact", quantization_config=settings, trust_remote_code=False, local_files_only=True
    )
    model.save_pretrained(path / "nf4")
    return path / "nf4"


def read(llm: FrozenLLM) -> tuple[Tensor, Tensor]:
    """Read-outs of two prompts, and the gradient of what is injected."""
    table = torch.randn(4, llm.dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
    # A pass without gradient comes first, as in evaluation: bitsandbytes used to drop gradients after it.
    with torch.no_grad():
        llm(pack(_prompts()), table)
    out_RD: Tensor = llm(pack(_prompts()), table)
    weight_RD = torch.randn(out_RD.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((out_RD * weight_RD).sum(), table)
    return out_RD.detach(), gradient


def test_values_and_gradients_are_those_of_the_dequantized_weights(folder: Path) -> None:
    llm = load_llm(LLMConfig(path=str(folder), dtype="float32"))
    layers = quantized_layers(llm)
    assert len(layers) == 3 * 7
    out_RD, gradient = read(llm)
    for name, module in list(llm.named_modules()):
        if module in layers:
            llm.set_submodule(name, dequantized(module))
    assert not quantized_layers(llm)
    exact_RD, expected = read(llm)
    torch.testing.assert_close(out_RD, exact_RD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    assert expected.abs().max() > 1


def test_it_is_close_to_the_exact_model_and_takes_less(folder: Path) -> None:
    llm, exact = (load_llm(LLMConfig(path=str(path), dtype="float32")) for path in (folder, folder.parent / "exact"))
    difference = (read(llm)[0] - read(exact)[0]).std() / read(exact)[0].std()
    assert 0.01 < float(difference) < 0.5

    def size(model: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in model.get_submodule("layers").parameters())

    assert size(llm.decoder) < size(exact.decoder) / 6


def test_it_is_not_quantized_again(folder: Path) -> None:
    with pytest.raises(LLMError, match=r"quantization=int8 cannot round weights that are quantized already: set"):
        load_llm(LLMConfig(path=str(folder), quantization="int8"))


def test_its_fingerprint_is_its_own(folder: Path) -> None:
    configs = [LLMConfig(path=str(path), dtype="float32") for path in (folder, folder.parent / "exact")]
    assert len({llm_fingerprint(config) for config in configs}) == 2
