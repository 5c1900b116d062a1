"""The frozen LLM: a stream equals separate prompts run by transformers, gradients reach only injected embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import build_llm
from nn_helpers import plain_varlen
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoModel

from trainer.config import LLMConfig
from trainer.data.collators.base import to_device
from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prompt import READOUT_SLOT, Branch, Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.nn.llm import attention
from trainer.nn.llm.backbone import FrozenLLM, llm_fingerprint, load_llm, load_tokenizer
from trainer.nn.pretrained import LLMError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo2"]
if Version(transformers.__version__) >= Version("5"):  # v4 names weights of its causal LM and decoder differently
    FAMILIES.append("gemma3_text")
PACKINGS: dict[str, Callable[[list[Prompt]], PackedPrompts]] = {
    "two passes": pack,
    "one pass": lambda prompts: pack(prompts, frozen_prefix=False),
    "rows": lambda prompts: pack_rows(prompts, 64),
}
KERNELS = {"groups": lambda query: None, "one call": lambda query: plain_varlen}
NOTHING = np.zeros(0, np.int64)


def _prompts(lengths: list[int], *, prefix_tokens: int = 0) -> list[Prompt]:
    """Prompts with slots and a read-out at the end; the first `prefix_tokens` tokens are the same in all."""
    rng = np.random.default_rng(1)
    prompts = []
    for length in lengths:
        token_T = rng.integers(2, 400, length)
        token_T[:prefix_tokens] = np.arange(2, 2 + prefix_tokens)
        slot_S = np.array(sorted({prefix_tokens + 1, max(length // 2, prefix_tokens + 2), length - 1}))
        prompts.append(Prompt(token_T, slot_S, np.array([1, 2, READOUT_SLOT]), slot_S[-1:]))
    return prompts


def _trees() -> list[Prompt]:
    """Trunks with branches at several positions, with or without read-outs and slots."""
    rng = np.random.default_rng(2)

    def branch(after: int, length: int) -> Branch:
        end = np.array([length - 1])
        return Branch(after, rng.integers(2, 400, length), end, np.array([READOUT_SLOT]), np.array([0, length - 1]))

    first, second, third = _prompts([40, 31, 26], prefix_tokens=12)
    leaves = (branch(40, 5), branch(20, 7), branch(8, 3))
    return [
        Prompt(first.token_T, first.slot_S, first.item_S, first.readout_R, leaves),
        second,
        Prompt(third.token_T, NOTHING, NOTHING, NOTHING, (branch(26, 4), branch(26, 6))),
        *_prompts([9]),
    ]


def _whole(prompt: Prompt) -> list[Prompt]:
    """Equivalent unbranched prompts: the trunk, if it has read-outs, and the trunk continued by each branch."""
    parts = [prompt] if len(prompt.readout_R) else []
    for branch in prompt.branches:
        kept = prompt.slot_S < branch.after
        parts.append(
            Prompt(
                np.append(prompt.token_T[: branch.after], branch.token_T),
                np.append(prompt.slot_S[kept], branch.after + branch.slot_S),
                np.append(prompt.item_S[kept], branch.item_S),
                branch.after + branch.readout_R,
            )
        )
    return parts


def _reference(llm_path: Path, prompts: list[Prompt], table_PID: Tensor) -> Tensor:
    """Read-outs of each prompt from a separate forward pass, with transformers' eager attention."""
    decoder = AutoModel.from_pretrained(llm_path, attn_implementation="eager").float().eval()
    read = []
    for number, prompt in enumerate(prompts):
        for part in _whole(prompt):
            embedding = decoder.get_input_embeddings()(torch.from_numpy(part.token_T))
            embedding = embedding.index_put((torch.from_numpy(part.slot_S),), table_PID[number, part.item_S])
            hidden = decoder(inputs_embeds=embedding[None], use_cache=False).last_hidden_state[0]
            read.append(hidden[torch.from_numpy(part.readout_R)])
    return torch.cat(read)


def _table(prompts: int, dim: int) -> Tensor:
    """Vectors for everything that a slot of a prompt may receive."""
    return torch.randn(prompts, 4, dim, generator=torch.Generator().manual_seed(2)) / 2


def _read(llm: FrozenLLM, packed: PackedPrompts, table_PID: Tensor) -> Tensor:
    read: Tensor = llm(packed, table_PID[packed.slot_prompt_S, packed.slot_item_S])
    return read


def _layers(llm: FrozenLLM) -> nn.ModuleList:
    layers = llm.decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_equals_separate_prompts_in_values_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kernel: str
) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", KERNELS[kernel])
    path = build_llm(tmp_path, family=family)
    llm = load_llm(LLMConfig(path=str(path), dtype="float32"))
    prompts = _trees()
    table = _table(len(prompts), llm.dim).requires_grad_()
    apart = _reference(path, prompts, table)
    weight = torch.randn(apart.shape, generator=torch.Generator().manual_seed(3))
    (expected,) = torch.autograd.grad((apart * weight).sum(), table)
    assert expected.abs().max() > 1e-3, "the comparison below would hold for vanished gradients too"
    for name, packing in PACKINGS.items():
        together = _read(llm, packing(prompts), table)
        (gradient,) = torch.autograd.grad((together * weight).sum(), table)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=3e-5, msg=name)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sliding_window_attention_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Mistral with a window shorter than the prompts."""
    monkeypatch.setattr(attention, "varlen_kernel", KERNELS[kernel])
    path = build_llm(tmp_path, family="mistral")
    settings = json.loads((path / "config.json").read_text())
    table = _table(4, 32)
    read = []
    for window in (None, 10):
        (path / "config.json").write_text(json.dumps(settings | {"sliding_window": window}))
        llm = load_llm(LLMConfig(path=str(path), dtype="float32"))
        read.append(_read(llm, pack(_trees()), table))
        torch.testing.assert_close(read[-1], _reference(path, _trees(), table), rtol=1e-5, atol=1e-5)
    assert (read[0] - read[1]).abs().max() > 1e-3


def test_a_kernel_that_aligns_first_queries_with_first_keys_is_detected(
    tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    table = _table(4, llm.dim)
    expected = _read(llm, pack(_trees()), table)
    monkeypatch.setattr(attention, "varlen_kernel", lambda query: partial(plain_varlen, align_last=False))
    assert (_read(llm, pack(_trees()), table) - expected).abs().max() > 0.1


def test_only_cuda_in_bf16_has_a_kernel() -> None:
    assert attention.varlen_kernel(torch.zeros(1, 4, 7, 64)) is None
    assert attention.varlen_kernel(torch.zeros(1, 4, 7, 64, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_of_torch_accepts_our_arguments(window: int | None) -> None:
    """Torch checks arguments and returns shapes even without the kernels, which run on CUDA only."""
    kernel = attention.torch_varlen()
    if kernel is None:
        pytest.skip("variable-length attention with a scale and a window requires torch 2.11")
    segments = to_device(pack(_trees()).trained, torch.device("meta")).segments
    assert segments is not None
    queries, keys = int(sum(len(part.token_T) for part in _trees())), len(segments.key_J)
    query = torch.empty(queries, 4, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key = torch.empty(keys, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    mixed = kernel(query, key, key, segments, 0.25, window)
    mixed.sum().backward()
    assert mixed.shape == query.shape
    assert key.grad is not None
    assert key.grad.shape == key.shape


def test_what_precedes_the_first_slot_is_run_once_and_without_gradient(tiny_llm: Path) -> None:
    llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    seen: list[tuple[int, bool]] = []
    _layers(llm)[1].register_forward_hook(lambda layer, args, out: seen.append((out.shape[1], out.requires_grad)))
    prompts = _prompts([30, 25, 25], prefix_tokens=12)
    packed = pack(prompts)
    _read(llm, packed, _table(3, llm.dim).requires_grad_())
    # 12 shared tokens, then one more before each prompt's first slot: the two prompts of 25 tokens differ in it.
    assert seen == [(12 + 3, False), (80 - 3 * 13, True)]
    assert (packed.useful_tokens, packed.run_tokens) == (80, 80 - 2 * 12)


def test_after_the_last_attention_only_read_outs_are_run(tiny_llm: Path) -> None:
    llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    rows: list[int] = []
    _layers(llm)[-1].get_submodule("mlp").register_forward_hook(lambda layer, args, out: rows.append(out.shape[1]))
    _read(llm, pack(_prompts([30, 25])), _table(2, llm.dim))
    assert rows == [0, 2]


def test_recomputed_activations_change_nothing(tiny_llm: Path) -> None:
    table = _table(len(_trees()), 32).requires_grad_()
    weight = torch.randn(13, 32, generator=torch.Generator().manual_seed(3))
    gradients: list[Tensor] = []
    forwards = []
    for recompute in (False, True):
        llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32", recompute=recompute))
        runs: list[int] = []
        _layers(llm)[0].get_submodule("self_attn").register_forward_hook(lambda *_, runs=runs: runs.append(1))
        hidden = _read(llm, pack(_trees()), table)
        gradients += torch.autograd.grad((hidden * weight).sum(), table)
        forwards.append(len(runs))
    first, second = gradients
    assert torch.equal(first, second)
    assert forwards == [2, 3], "the pass without gradient is not recomputed"


def test_an_empty_batch_still_runs_through_the_decoder(tiny_llm: Path) -> None:
    """A rank without prompts must still take part in ZeRO-3's collectives."""
    llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    for packing in PACKINGS.values():
        assert llm(packing([]), torch.zeros(0, llm.dim)).shape == (0, llm.dim)


def test_only_injected_embeddings_receive_a_gradient(tiny_llm: Path) -> None:
    llm = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32")).train()
    before = {name: p.clone() for name, p in llm.named_parameters()}
    table = torch.zeros(2, 4, llm.dim, requires_grad=True)
    _read(llm, pack(_prompts([20, 20])), table).sum().backward()
    assert table.grad is not None
    assert table.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in llm.parameters())
    assert all(torch.equal(before[name], p) for name, p in llm.named_parameters())
    assert not llm.training
    assert not llm.decoder.training


def test_first_layers_only(tiny_llm: Path) -> None:
    whole = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    short = load_llm(LLMConfig(path=str(tiny_llm), dtype="float32", layers=1))
    assert len(_layers(whole)) == 3
    assert len(_layers(short)) == 1
    name = "layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(short.decoder.get_parameter(name), whole.decoder.get_parameter(name))
    with pytest.raises(LLMError, match=r"layers=4, but .* has 3 layers"):
        load_llm(LLMConfig(path=str(tiny_llm), layers=4))


def test_bfloat16_weights_fp32_read_outs(tiny_llm: Path) -> None:
    llm = load_llm(LLMConfig(path=str(tiny_llm)))
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
    assert _read(llm, pack(_prompts([12])), torch.zeros(1, 4, llm.dim)).dtype == torch.float32


def test_the_fingerprint_follows_weights_and_layers(tmp_path: Path) -> None:
    folder = build_llm(tmp_path)
    config = LLMConfig(path=str(folder), dtype="float32")
    first = llm_fingerprint(config)
    assert llm_fingerprint(config) == first
    assert llm_fingerprint(config.model_copy(update={"layers": 2})) != first
    quantized = [llm_fingerprint(config.model_copy(update={"quantization": name})) for name in ("int8", "fp8")]
    assert len({first, *quantized}) == 3
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    assert llm_fingerprint(config) != first


@pytest.mark.parametrize("name", ["pytorch_model.bin", "vocab.txt", "qwen.tiktoken", "spiece.model"])
def test_the_fingerprint_covers_every_file_that_is_read(tmp_path: Path, name: str) -> None:
    """A `pytorch_model.bin` could be exchanged between two starts of a run."""
    config = LLMConfig(path=str(tmp_path))
    (tmp_path / name).write_bytes(b"one")
    first = llm_fingerprint(config)
    (tmp_path / "README.md").write_bytes(b"not read")
    assert llm_fingerprint(config) == first
    (tmp_path / name).write_bytes(b"two")
    assert llm_fingerprint(config) != first


def test_capped_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LLMError, match="caps its attention scores"):
        load_llm(LLMConfig(path=str(build_llm(tmp_path, family="gemma2"))))


def test_a_model_that_is_not_a_causal_lm_is_refused(tmp_path: Path, tiny_llm: Path) -> None:
    with pytest.raises(LLMError, match="is not a language model"):
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
