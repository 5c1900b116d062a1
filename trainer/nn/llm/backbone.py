"""The frozen LLM: load it, freeze it, read hidden states at slots.

Letters: N tokens of a stream, S slots, P read-outs, D width of the LLM; M rows of a store, each of L layers, 2 (key and
value), h key heads of width d.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainer.config import LLMConfig
from trainer.data.prompts.packing import PackedPrompts, Stream
from trainer.device import graph_backend
from trainer.nn.dropout import TokenDropout
from trainer.nn.llm.attention import SEGMENTS, Memory, Pass, finish_at_readouts
from trainer.nn.llm.fp8 import check_fp8, use_fp8
from trainer.nn.llm.fused import fuse
from trainer.nn.llm.liger import check_liger, use_liger
from trainer.nn.pretrained import LLMError, fingerprint, read_model, read_settings, read_tokenizer
from trainer.runs.requirements import LLM_CURE

_GRAPHS = 64
"""Kept: two (of the first layer, which also makes the mask, and of the others) for each number of rows, in training and
in evaluation. torch stops compiling at 8."""


class FrozenLLM(nn.Module):
    """A decoder without its LM head. Its weights never change, gradients flow through it to what is put in and to
    adapters (`lora.py`)."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(False)
        self.decoder.train(False)
        self.dim = int(decoder.config.hidden_size)
        self.cache_ML2hd: Tensor | None = None
        """Keys and values that were computed before the run (see `title_store.py`), on the host."""
        layers: Any = decoder.layers
        finish_at_readouts(layers[-1])

    def token_table(self) -> Tensor:
        """(vocabulary, D) input embeddings."""
        return self._embedding().weight

    def forward(self, prompts: PackedPrompts, vector_SD: Tensor) -> Tensor:
        """Hidden states (P, D) in fp32 after the final norm, at the prompts' read-outs.

        Args:
            vector_SD: what stands in the prompts' slots instead of token embeddings.
        """
        memory = []
        if prompts.frozen is not None:
            memory.append(self._kept(Pass(prompts.frozen, remember=True)))
        if len(prompts.cached_M):
            assert self.cache_ML2hd is not None, "who packs for a store opens it too"
            rows_ML2hd = self.cache_ML2hd[torch.from_numpy(prompts.cached_M)]
            memory.append(_by_layer(rows_ML2hd.to(prompts.slot_S.device)))
        embedding_TD = self._embedding()(prompts.trained.token_T)
        embedding_TD = embedding_TD.index_put((prompts.slot_S,), vector_SD.to(embedding_TD.dtype))
        return self._run(Pass(prompts.trained, prompts.readout_R, memory), embedding_TD).float()

    def keys(self, stream: Stream, before_ML2hd: Tensor) -> Tensor:
        """(N, L, 2, h, d) keys and values of L layers for a stream that continues those of `before_ML2hd`."""
        kept = self._kept(Pass(stream, memory=[_by_layer(before_ML2hd)], remember=True))
        return torch.stack([torch.stack(kept[layer], 1) for layer in range(len(kept))], 1)

    def train(self, mode: bool = True) -> FrozenLLM:
        """Stays in evaluation mode, for a frozen model has no dropout, but for the dropout of adapters."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, TokenDropout):
                module.train(mode)
        return self

    @torch.no_grad()
    def _kept(self, segments: Pass) -> Memory:
        self._run(segments, self._embedding()(segments.stream.token_T))
        return segments.kept

    def _run(self, segments: Pass, embedding_TD: Tensor) -> Tensor:
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


def _by_layer(keys_ML2hd: Tensor) -> Memory:
    return {layer: (keys_ML2hd[:, layer, 0], keys_ML2hd[:, layer, 1]) for layer in range(keys_ML2hd.shape[1])}


def check_llm(config: LLMConfig) -> None:
    """Whether `config.path` holds a causal LM with enough layers, before its weights are loaded.

    Raises:
        LLMError: it does not; the message has the cure.
    """
    _checked(config)


def load_llm(config: LLMConfig) -> FrozenLLM:
    """The decoder of a causal LM, in `config.dtype`, cut to `config.layers` layers.

    Raises:
        LLMError: no such folder, no causal LM, more layers asked for than there are, weights missing or damaged.
    """
    decoder = read_model(
        config.path,
        _checked(config),
        dtype=config.dtype,
        cure=LLM_CURE,
        quantization_config=_quantization(config),
        attn_implementation=SEGMENTS,
    )
    if config.quantization == "fp8":
        use_fp8(decoder)
    if config.kernels == "liger":
        use_liger(decoder)
    llm = FrozenLLM(decoder)
    if config.packing == "rows" and (backend := graph_backend()):
        compile_layers(llm, backend)
    elif config.kernels == "none":  # a compiler does this by itself
        fuse(llm.decoder)
    if config.recompute:
        layers: Any = llm.decoder.layers
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return llm


def compile_layers(llm: FrozenLLM, backend: str | Callable[..., Any]) -> None:
    """Make each layer a graph of fixed shapes; for packed rows, since a stream has other shapes at every step.

    Not the last one, which ends at the read-outs, of which there are as many as a batch has prompts.
    """
    torch._dynamo.config.recompile_limit = _GRAPHS
    layers: Any = llm.decoder.layers
    for layer in layers[:-1]:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def _quantization(config: LLMConfig) -> BitsAndBytesConfig | None:
    if config.quantization != "int8":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LLMError(
            "system.llm.quantization=int8 needs bitsandbytes: `pip install bitsandbytes`, or set quantization=none"
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in the same folder.

    Raises:
        LLMError: there is none.
    """
    return read_tokenizer(config.path, cure=LLM_CURE)


def llm_fingerprint(config: LLMConfig) -> str:
    """Twelve hex digits that change with the weights, the tokenizer or the number of layers run."""
    return fingerprint(config.path, config.layers, config.dtype, config.quantization)


def key_shape(config: LLMConfig) -> tuple[int, int, int]:
    """Layers that are run, their key heads and the width of a head."""
    settings = _settings(config)
    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return settings.num_hidden_layers, getattr(settings, "num_key_value_heads", None) or heads, width


def _checked(config: LLMConfig) -> PretrainedConfig:
    settings = _settings(config)
    if config.kernels == "liger":
        check_liger(settings)
    if config.quantization == "fp8":
        check_fp8(settings)
    return settings


def _settings(config: LLMConfig) -> PretrainedConfig:
    settings = _causal_lm_config(config.path)
    if getattr(settings, "attn_logit_softcapping", None) is not None:
        raise LLMError(
            f"{config.path} caps its attention scores ('{settings.model_type}'), which is not built; {LLM_CURE}"
        )
    if config.layers is not None:
        if config.layers > settings.num_hidden_layers:
            raise LLMError(
                f"system.llm.layers={config.layers}, but {config.path} has {settings.num_hidden_layers} layers: "
                "lower it, or leave it out to run all"
            )
        settings.num_hidden_layers = config.layers
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[: config.layers]
    return settings


def _causal_lm_config(path: str) -> PretrainedConfig:
    settings = read_settings(path, what=f"system.llm.path={path} is no language model", cure=LLM_CURE)
    kind = settings.model_type
    # Encoders such as BERT are in the list of causal LMs too, for they can be run as decoders.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(settings, "is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or getattr(settings, "is_encoder_decoder", False):
        raise LLMError(f"{path} holds a '{kind}', not a causal LM; {LLM_CURE}")
    architectures = settings.architectures or []
    if architectures and not any("CausalLM" in name or name.endswith("Model") for name in architectures):
        raise LLMError(f"{path} holds {architectures[0]}, not a causal LM; {LLM_CURE}")
    return settings
