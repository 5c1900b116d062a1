"""The frozen LLM: packed prompts equal separate ones, gradients reach only what was put in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import build_llm

from trainer.config import LLMConfig
from trainer.data.packing import pack
from trainer.data.prompts import Prompt
from trainer.nn.backbone import FrozenLLM, LLMError, llm_fingerprint, load_llm, load_tokenizer

ROW = 64


def _prompts(lengths: list[int]) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for length in lengths:
        tokens = torch.randint(2, 400, (length,), generator=generator).numpy()
        slots = sorted({length // 3, length // 2})
        prompts.append(Prompt(tokens, torch.tensor(slots).numpy(), torch.tensor(slots).numpy()))
    return prompts


def _read(llm: FrozenLLM, prompts: list[Prompt], vectors: torch.Tensor, row: int) -> torch.Tensor:
    packed = pack(prompts, row)
    slot = (packed.slot_row_S, packed.slot_column_S)
    return llm(packed.token_RT, packed.position_RT, slot, vectors, (packed.readout_row_P, packed.readout_column_P))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_packed_prompts_equal_separate_prompts_in_values_and_gradients(tmp_path: Path, family: str) -> None:
    llm = load_llm(LLMConfig(path=str(build_llm(tmp_path, family=family)), dtype="float32"))
    prompts = _prompts([40, 23, 9, 31, 17, 5])
    total = sum(len(p.slot_S) for p in prompts)
    vectors = torch.randn(total, llm.dim, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weight = torch.randn(len(prompts), llm.dim, generator=torch.Generator().manual_seed(3))

    together = _read(llm, prompts, vectors, ROW)
    (gradient,) = torch.autograd.grad((together * weight).sum(), vectors)

    first = 0
    for number, prompt in enumerate(prompts):
        own = vectors[first : first + len(prompt.slot_S)].detach().requires_grad_()
        alone = _read(llm, [prompt], own, len(prompt.token_T))
        (own_gradient,) = torch.autograd.grad((alone[0] * weight[number]).sum(), own)
        torch.testing.assert_close(together[number], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient[first : first + len(prompt.slot_S)], own_gradient, rtol=1e-5, atol=1e-5)
        first += len(prompt.slot_S)
    assert gradient.abs().max() > 1e-3, "the comparison above would hold for vanished gradients too"


def test_without_restarting_positions_prompts_would_leak(tiny_llm: Path) -> None:
    """The control of the test above: what isolates prompts is the restart, so without it values change."""
    llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    packed = pack(_prompts([30, 30]), ROW)
    slot = (packed.slot_row_S, packed.slot_column_S)
    vectors = torch.zeros(len(packed.slot_item_S), llm.dim)
    readout = (packed.readout_row_P, packed.readout_column_P)
    right = llm(packed.token_RT, packed.position_RT, slot, vectors, readout)
    leaking = llm(packed.token_RT, torch.arange(ROW).expand_as(packed.position_RT), slot, vectors, readout)
    assert (right - leaking).abs().max() > 1e-3


def test_only_what_is_put_in_receives_a_gradient(tiny_llm: Path) -> None:
    llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32")).train()
    before = {name: p.clone() for name, p in llm.named_parameters()}
    vectors = torch.zeros(4, llm.dim, requires_grad=True)
    _read(llm, _prompts([20, 20]), vectors, ROW).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in llm.parameters())
    assert all(torch.equal(before[name], p) for name, p in llm.named_parameters())
    assert not llm.training
    assert not llm.decoder.training


def test_first_layers_only(tiny_llm: Path) -> None:
    whole = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    short = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32", layers=1))
    assert len(whole.decoder.layers) == 3
    assert len(short.decoder.layers) == 1
    torch.testing.assert_close(
        short.decoder.layers[0].mlp.down_proj.weight, whole.decoder.layers[0].mlp.down_proj.weight
    )
    with pytest.raises(LLMError, match=r"layers=4, but .* has 3 layers"):
        load_llm(LLMConfig(path=str(tiny_llm), layers=4))


def test_bfloat16_weights_fp32_read_outs(tiny_llm: Path) -> None:
    llm = load_llm(LLMConfig(path=str(tiny_llm)))
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
    assert _read(llm, _prompts([12]), torch.zeros(2, llm.dim), ROW).dtype == torch.float32


def test_the_fingerprint_follows_weights_and_layers(tmp_path: Path) -> None:
    folder = build_llm(tmp_path)
    config = LLMConfig(path=str(folder), dtype="float32")
    first = llm_fingerprint(config)
    assert llm_fingerprint(config) == first
    assert llm_fingerprint(config.model_copy(update={"layers": 2})) != first
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    assert llm_fingerprint(config) != first


def test_what_is_no_causal_lm_is_refused(tmp_path: Path, tiny_llm: Path) -> None:
    with pytest.raises(LLMError, match="is no language model"):
        load_llm(LLMConfig(path=str(tmp_path / "missing")))
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    settings = {"model_type": "distilbert", "architectures": ["DistilBertModel"], "dim": 32}
    (encoder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LLMError, match="holds a 'distilbert', not a causal LM"):
        load_llm(LLMConfig(path=str(encoder)))
    with pytest.raises(LLMError, match="no tokenizer"):
        load_tokenizer(LLMConfig(path=str(encoder)))
    assert load_tokenizer(LLMConfig(path=str(tiny_llm))).bos_token == "<|begin|>"
