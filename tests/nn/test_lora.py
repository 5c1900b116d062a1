"""LoRA adapters: which parameters train, and that packing changes neither gradients nor dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.config import LLMConfig, LoRAConfig
from trainer.data.prompts.packing import pack
from trainer.data.prompts.prompt import Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.models.llm.prompt_reader import PromptReader
from trainer.nn.llm.backbone import FrozenLLM, load_llm
from trainer.nn.llm.lora import add_adapters
from trainer.nn.pretrained import LLMError


def _llm(path: Path, dtype: str = "float32") -> FrozenLLM:
    torch.manual_seed(0)
    return load_llm(LLMConfig(path=str(path), dtype=dtype))


def _reader(path: Path, *, dropout: float = 0.0, trained: bool = True) -> PromptReader:
    llm = _llm(path)
    adapters = add_adapters(llm, LoRAConfig(rank=3, dropout=dropout, targets=("q_proj", "v_proj", "down_proj")))
    if trained:  # adapters start at zero because their second factor does
        for number, parameter in enumerate(p for p in llm.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(number)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return PromptReader(llm, adapters=adapters).train()


def _prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    lengths = (40, 23, 9, 31, 17)
    none = torch.zeros(0, dtype=torch.long).numpy()
    tokens = [torch.randint(2, 400, (length,), generator=generator).numpy() for length in lengths]
    return [Prompt(token_T, none, none, torch.tensor([len(token_T) - 1]).numpy()) for token_T in tokens]


def _read(reader: PromptReader, prompts: list[Prompt], *, seed: int = 7, rows: int | None = None) -> Tensor:
    torch.manual_seed(seed)
    packed = pack(prompts, frozen_prefix=False) if rows is None else pack_rows(prompts, rows)
    hidden: Tensor = reader(packed, None, torch.zeros(0, reader.llm.dim))
    return hidden


def test_adapters_train_and_the_llm_does_not(tiny_llm: Path) -> None:
    reader = _reader(tiny_llm, trained=False)
    trained = {name for name, p in reader.named_parameters() if p.requires_grad}
    modules = [*(f"self_attn.{name}" for name in ("q_proj", "v_proj")), "mlp.down_proj"]
    assert trained == {
        f"llm.decoder.layers.{layer}.{module}.lora_{factor}.default.weight"
        for layer in range(3) for module in modules for factor in "AB"
    }  # fmt: skip
    before = {name: p.clone() for name, p in reader.named_parameters()}
    plain = PromptReader(_llm(tiny_llm))
    torch.testing.assert_close(_read(reader, _prompts()), _read(plain, _prompts()))

    optimizer = torch.optim.Adam([p for p in reader.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        _read(reader, _prompts()).square().sum().backward()
        optimizer.step()
    for name, parameter in reader.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_gradients_of_adapters_do_not_depend_on_packing(tiny_llm: Path) -> None:
    reader, prompts = _reader(tiny_llm), _prompts()
    adapters = [p for p in reader.parameters() if p.requires_grad]
    weight = torch.randn(len(prompts), reader.llm.dim, generator=torch.Generator().manual_seed(3))
    together = torch.autograd.grad((_read(reader, prompts) * weight).sum(), adapters)
    alone = [torch.zeros_like(p) for p in adapters]
    for number, prompt in enumerate(prompts):
        hidden = _read(reader, [prompt])
        for total, part in zip(alone, torch.autograd.grad((hidden[0] * weight[number]).sum(), adapters), strict=True):
            total += part
    for one, other in zip(together, alone, strict=True):
        assert one.abs().max() > 1e-3
        assert (one - other).norm() < 1e-5 * one.norm()


def test_dropout_does_not_depend_on_packing_or_other_prompts(tiny_llm: Path) -> None:
    reader, prompts = _reader(tiny_llm, dropout=0.3), _prompts()
    together = _read(reader, prompts)
    backwards = _read(reader, prompts[::-1], rows=128).flip(0)
    torch.testing.assert_close(together, backwards, rtol=1e-4, atol=1e-5)
    for number, prompt in enumerate(prompts):
        torch.testing.assert_close(_read(reader, [prompt])[0], together[number], rtol=1e-4, atol=1e-5)
    assert (_read(reader, prompts, seed=8) - together).abs().max() > 0.01, "a different step has different masks"
    still = _read(reader.eval(), prompts)
    assert (still - together).abs().max() > 0.01
    assert not reader.train().llm.decoder.training, "only the adapters' dropout follows train mode"


def test_adapters_are_fp32_in_a_bf16_llm(tiny_llm: Path) -> None:
    llm = _llm(tiny_llm, "bfloat16")
    add_adapters(llm, LoRAConfig())
    assert {p.dtype for p in llm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in llm.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert _read(PromptReader(llm).eval(), _prompts()).isfinite().all()


def test_an_unknown_layer_is_refused(tiny_llm: Path) -> None:
    with pytest.raises(
        LLMError, match=r"targets names query, which this LLM does not have: choose from down_proj, .*v_proj"
    ):
        add_adapters(_llm(tiny_llm), LoRAConfig(targets=("q_proj", "query")))
