"""The frozen LLM: loading and freezing it, and hidden states at read-outs.

Letters: T tokens of a stream, S slots, R read-outs, D width of the LLM, V words of the vocabulary; M rows of the prefix
cache, each of L layers, 2 (key and value), h KV heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainer.config import LLMConfig
from trainer.data.prompts.packing import PackedPrompts, Stream
from trainer.device import graph_backend
from trainer.nn.dropout import TokenDropout
from trainer.nn.llm.attention import SEGMENTS, DecoderPass, KVCache, finish_at_readouts, reads_groups
from trainer.nn.llm.fp8 import Float8Linear, check_fp8
from trainer.nn.llm.fused import fuse
from trainer.nn.llm.int8 import Int8Linear
from trainer.nn.llm.liger import check_liger, use_liger
from trainer.nn.llm.linear_layers import check_linear, check_not_quantized, keep_gradients, replace_linear_layers
from trainer.nn.llm.packing_check import check_packing, decoder_layers, first_layers
from trainer.nn.pretrained import LLMError, fingerprint, read_model, read_settings, read_tokenizer
from trainer.runs.model_folder import LLM_CURE

_RECOMPILE_LIMIT = 64
"""Graphs that torch.compile may keep of the layers (its default is 8). A run needs two for each number of rows (one for
the first layer, which also builds the mask, one for the other layers), in training and in evaluation."""
_QUANTIZED = {"int8": Int8Linear, "fp8": Float8Linear}


class FrozenLLM(nn.Module):
    """A decoder without its LM head. Its weights never change; gradients flow through it to the injected embeddings and
    to adapters (`lora.py`)."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(False)
        self.decoder.train(False)
        self.dim = int(decoder.config.hidden_size)
        self.cache_ML2hd: Tensor | None = None
        """Prefix cache computed before the run (`prefix_cache.py`), on the host; None without one."""
        finish_at_readouts(decoder_layers(decoder)[-1])

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, first to last."""
        return decoder_layers(self.decoder)

    def token_table(self) -> Tensor:
        """(V, D) input embeddings."""
        return self._embedding().weight

    def forward(self, prompts: PackedPrompts, vector_SD: Tensor) -> Tensor:
        """Hidden states (R, D) in fp32 after the final norm, at the prompts' read-outs.

        Args:
            vector_SD: injected embeddings, which replace the token embeddings of the prompts' slots.
        """
        memory = []  # the frozen pass first, then the prefix cache: the order in which `pack` counts keys
        if prompts.frozen is not None:
            memory.append(self._kv_cache(DecoderPass(prompts.frozen, remember=True)))
        if len(prompts.cached_M):
            assert self.cache_ML2hd is not None, "prompts that were packed for a prefix cache need it open"
            rows_ML2hd = self.cache_ML2hd[torch.from_numpy(prompts.cached_M)]
            memory.append(_by_layer(rows_ML2hd.to(prompts.slot_S.device)))
        embedding_TD = self._embedding()(prompts.trained.token_T)
        embedding_TD = embedding_TD.index_put((prompts.slot_S,), vector_SD.to(embedding_TD.dtype))
        return self._run(DecoderPass(prompts.trained, prompts.readout_R, memory), embedding_TD).float()

    def keys(self, stream: Stream, before_ML2hd: Tensor) -> Tensor:
        """(T, L, 2, h, d) keys and values of all layers for a stream that continues the context `before_ML2hd`."""
        kept = self._kv_cache(DecoderPass(stream, memory=[_by_layer(before_ML2hd)], remember=True))
        return torch.stack([torch.stack(kept[layer], 1) for layer in range(len(kept))], 1)

    def train(self, mode: bool = True) -> FrozenLLM:
        """Switch the dropout of adapters only; the frozen model, which has no dropout, stays in evaluation mode."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, TokenDropout):
                module.train(mode)
        return self

    @torch.no_grad()
    def _kv_cache(self, segments: DecoderPass) -> KVCache:
        self._run(segments, self._embedding()(segments.stream.token_T))
        return segments.kept

    def _run(self, segments: DecoderPass, embedding_TD: Tensor) -> Tensor:
        hidden_1RD: Tensor = self.decoder(
            inputs_embeds=embedding_TD[None],
            position_ids=segments.stream.position_T[None],
            use_cache=False,
            segments=segments,
        ).last_hidden_state
        return hidden_1RD[0]

    def _embedding(self) -> nn.Embedding:
        embedding = self.decoder.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding


def _by_layer(keys_ML2hd: Tensor) -> KVCache:
    return {layer: (keys_ML2hd[:, layer, 0], keys_ML2hd[:, layer, 1]) for layer in range(keys_ML2hd.shape[1])}


def check_llm(config: LLMConfig) -> None:
    """Check that `config.path` holds a causal LM with enough layers, without loading its weights.

    Raises:
        LLMError: it does not; the message names the cure.
    """
    _checked(config)


def load_llm(config: LLMConfig) -> FrozenLLM:
    """Load the decoder of a causal LM, in `config.dtype`, cut to its first `config.layers` layers.

    Raises:
        LLMError: no such folder, not a causal LM, fewer layers than `config.layers`, weights missing or damaged, or a
            decoder that does not keep packed prompts apart.
    """
    decoder = read_model(
        config.path,
        _checked(config),
        dtype=config.dtype,
        cure=LLM_CURE,
        attn_implementation=SEGMENTS,
    )
    keep_gradients(decoder)
    check_packing(decoder, config.path, partial(_frozen, fused=config.kernels == "none"))
    if config.quantization != "none":
        check_linear(decoder_layers(decoder), config.quantization)
        replace_linear_layers(decoder, _QUANTIZED[config.quantization])
    if config.kernels == "liger":
        use_liger(decoder)
    backend = graph_backend() if config.packing == "rows" else None
    llm = _frozen(decoder, fused=config.kernels == "none" and not backend)  # a compiler fuses on its own
    if backend:
        compile_layers(llm, backend)
    if config.recompute:
        for layer in llm.layers:
            # The reentrant form takes no keyword arguments, and layers are called with some.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return llm


def _frozen(decoder: PreTrainedModel, *, fused: bool) -> FrozenLLM:
    llm = FrozenLLM(decoder)
    if fused:
        fuse(llm.decoder)
    return llm


def compile_layers(llm: FrozenLLM, backend: str | Callable[..., Any]) -> None:
    """Compile the layers to graphs of fixed shapes; for padded rows only, since a stream's shapes differ at every step.

    The last layer is left out: it ends at the read-outs, whose number depends on the prompts of the batch.
    """
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    for layer in llm.layers[:-1]:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the LLM's folder.

    Raises:
        LLMError: the folder has none that loads.
    """
    return read_tokenizer(config.path, cure=LLM_CURE)


def llm_fingerprint(config: LLMConfig) -> str:
    """Twelve hex digits that change with the weights, the tokenizer, the layers run, the dtype or the quantization."""
    # Runs of before this release that are fingerprinted "int8" used LLM.int8(), whose results differ.
    quantization = "int8 weights" if config.quantization == "int8" else config.quantization
    return fingerprint(config.path, config.layers, config.dtype, quantization)


def kv_cache_shape(config: LLMConfig) -> tuple[int, int, int]:
    """(L, h, d): layers that are run, their KV heads and the head width."""
    settings = _settings(config)
    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return settings.num_hidden_layers, getattr(settings, "num_key_value_heads", None) or heads, width


def needs_groups(config: LLMConfig) -> bool:
    """Whether the LLM's attention reads the groups of packed streams on this process's device."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return reads_groups(dtype, kv_cache_shape(config)[2])


def _checked(config: LLMConfig) -> PretrainedConfig:
    settings = _settings(config)
    if config.kernels == "liger":
        check_liger(settings)
    if config.quantization != "none":
        check_not_quantized(settings, config.quantization)
    if config.quantization == "fp8":
        check_fp8(settings)
    return settings


def _settings(config: LLMConfig) -> PretrainedConfig:
    settings = _causal_lm_config(config.path)
    # `attend` has no such cap and would ignore it.
    if getattr(settings, "attn_logit_softcapping", None) is not None:
        raise LLMError(
            f"{config.path} caps its attention scores ('{settings.model_type}'), which is not supported; {LLM_CURE}"
        )
    if (chunk := getattr(settings, "attention_chunk_size", None)) and chunk < config.max_tokens:
        raise LLMError(
            f"{config.path} attends in chunks of {chunk} tokens, which prompts of up to system.llm.max_tokens="
            f"{config.max_tokens} would cross: set system.llm.max_tokens={chunk} or less"
        )
    if config.layers is not None:
        if config.layers > settings.num_hidden_layers:
            raise LLMError(
                f"system.llm.layers={config.layers}, but {config.path} has {settings.num_hidden_layers} layers: "
                "lower it, or leave it out to run all"
            )
        first_layers(settings, config.layers)
    return settings


def _causal_lm_config(path: str) -> PretrainedConfig:
    settings = read_settings(path, what=f"system.llm.path={path} is not a language model", cure=LLM_CURE)
    kind = settings.model_type
    # Encoders such as BERT are also listed as causal LMs, because they can run as decoders.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(settings, "is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or getattr(settings, "is_encoder_decoder", False):
        raise LLMError(f"{path} holds a '{kind}', not a causal LM; {LLM_CURE}")
    architectures = settings.architectures or []
    if architectures and not any("CausalLM" in name or name.endswith("Model") for name in architectures):
        raise LLMError(f"{path} holds {architectures[0]}, not a causal LM; {LLM_CURE}")
    return settings
