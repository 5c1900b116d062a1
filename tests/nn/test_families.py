"""Families of decoders that people bring: which keep packed prompts apart, and what the others are refused for.

The two tables of docs/language_models.md are these results.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import ROOT, build_llm
from packaging.version import Version
from transformers import AutoConfig, AutoModel

from trainer.config import LLMConfig
from trainer.nn.llm.attention import SEGMENTS
from trainer.nn.llm.backbone import _frozen, check_llm, load_llm
from trainer.nn.llm.packing_check import check_packing
from trainer.nn.pretrained import LLMError

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="the tables are those of transformers 5"
)

SIZE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv"]}
HEAD, PAD = {"head_dim": 8}, {"pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {}, "arcee": {}, "biogpt": {}, "cohere": {}, "cohere2": {"sliding_window": 16}, "deepseek_v2": LATENT,
    "deepseek_v3": LATENT, "ernie4_5": {}, "exaone4": {}, "gemma": HEAD, "gemma3_text": HEAD | {"sliding_window": 16},
    "glm": HEAD | PAD, "glm4": HEAD | PAD, "gpt_neox": {}, "granite": {}, "granitemoe": LOCAL_EXPERTS, "helium": HEAD,
    "hunyuan_v1_dense": HEAD, "internlm3": {}, "jetmoe": {}, "llama": {}, "llama4_text": LOCAL_EXPERTS | HEAD
    | {"intermediate_size_mlp": 48}, "ministral3": HEAD, "mistral": {"sliding_window": 16}, "mixtral": LOCAL_EXPERTS,
    "modernbert-decoder": PAD | {"local_attention": 16}, "olmo": {}, "olmo2": {}, "olmo3": {"sliding_window": 16},
    "olmoe": EXPERTS, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "persimmon": {}, "phi": {}, "phi3": PAD,
    "phimoe": LOCAL_EXPERTS, "qwen2": {}, "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16}, "qwen3": {},
    "qwen3_moe": EXPERTS | HEAD | {"decoder_sparse_step": 1}, "seed_oss": HEAD, "smollm3": PAD, "starcoder2": {},
    "bloom": {"n_layer": 3, "n_head": 4}, "codegen": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8},
    "diffllama": {}, "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}, "gemma2": HEAD,
    "gemma4_text": HEAD | {"vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4}, "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_oss": LOCAL_EXPERTS | HEAD, "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8},
    "jamba": {"num_experts": 2}, "kimi_linear": PAD | EXPERTS,
    "lfm2": CONVOLUTION | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLUTION | EXPERTS, "mamba": {}, "minimax": {}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "nemotron": {}, "nemotron_h": {}, "qwen3_5_text": LINEAR, "recurrent_gemma": {},
    "qwen3_next": LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}, "stablelm": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 3},
}  # fmt: skip


def refusal(family: str, folder: Path, **more: Any) -> str | None:
    """Reason for which a random tiny model of the family is refused; None if it is accepted."""
    torch.manual_seed(0)
    settings = SIZE | FAMILIES[family] | more
    try:
        if getattr(config := AutoConfig.for_model(family, **settings), "attn_logit_softcapping", None):
            raise KeyError(family)  # refused by its settings
        decoder = AutoModel.from_config(config, trust_remote_code=False, attn_implementation=SEGMENTS).float()
    except KeyError:  # it cannot be built so, and is refused while it is loaded
        try:
            load_llm(LLMConfig(path=str(build_llm(folder, family=family)), dtype="float32"))
        except LLMError as error:
            return str(error)
        return None
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    try:
        check_packing(decoder, "models/x", partial(_frozen, fused=True))
    except LLMError as error:
        return str(error)
    finally:
        after = decoder.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "the check changed the model"
    return None


def documented() -> dict[str, str]:
    """Families of the tables, each with the reason of the refusal, or ""."""
    page = (ROOT / "docs" / "language_models.md").read_text()
    accepted, _, refused = page.partition("## Refused")
    found = {name: "" for row in re.findall(r"^\| (`[^|]*) \|", accepted, re.M) for name in re.findall("`(.*?)`", row)}
    for names, reason in re.findall(r"^\| (`[^|]*) \| ([^|]*?) \|", refused, re.M):
        found |= dict.fromkeys(re.findall("`(.*?)`", names), reason)
    del found["model_type"]  # the tables' heads
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_accepted_or_refused_as_documented(tmp_path: Path, family: str) -> None:
    found, reason = refusal(family, tmp_path), documented()[family]
    if not reason:
        assert found is None
        return
    assert found is not None
    assert reason in found
    assert "system.llm.path" in found
    assert "\n" not in found


def test_the_tables_hold_what_is_tested() -> None:
    assert documented().keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "(bidirectional attention)"),
        ("llama4_text", {"attention_chunk_size": 16}, "(attention in chunks of 16 tokens)"),
    ],
)
def test_settings_that_change_attention_are_refused(
    tmp_path: Path, family: str, more: dict[str, Any], words: str
) -> None:
    assert words in (refusal(family, tmp_path, **more) or "accepted")


def test_chunks_that_prompts_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Longer than the prompts of the check, shorter than those of training."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text", "attention_chunk_size": 512}))
    check_llm(LLMConfig(path=str(tmp_path), max_tokens=512))
    with pytest.raises(LLMError, match=r"in chunks of 512 tokens, .*: set system.llm.max_tokens=512 or less"):
        check_llm(LLMConfig(path=str(tmp_path), max_tokens=513))


def test_experts_are_not_quantized(tmp_path: Path) -> None:
    """They are no linear layers, so that int8 would save next to nothing, in silence."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZE, **FAMILIES["qwen3_moe"])
    transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(tmp_path)
    load_llm(LLMConfig(path=str(tmp_path), dtype="float32"))
    with pytest.raises(LLMError, match=r"quantization=int8 rounds linear layers, which hold \d+ % .*quantization=none"):
        load_llm(LLMConfig(path=str(tmp_path), dtype="float32", quantization="int8"))


def test_loading_refuses_a_convolution_in_one_line(tmp_path: Path) -> None:
    """Through the folder, as people bring it; LFM2 trained, with results that depended on the batch size."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("lfm2", **SIZE, **FAMILIES["lfm2"])
    transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(tmp_path)
    with pytest.raises(LLMError, match=r"holds a 'lfm2' \(convolution over tokens\), whose hidden states") as caught:
        load_llm(LLMConfig(path=str(tmp_path), dtype="bfloat16", quantization="int8"))
    assert "\n" not in str(caught.value)
