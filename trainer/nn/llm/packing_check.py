"""Check of a decoder that people bring: do prompts packed in one stream give what each gives alone?

The trainer runs many prompts end to end, and its own attention (`attention.py`) keeps them apart. Whatever else mixes
tokens (a convolution, a state space) or attends differently (sinks, both directions) would leak from one prompt into
the next, and train without an error. So the first layers of each decoder run two short prompts twice at load: packed,
and apart through the model's own eager attention in transformers.

Letters: T tokens of a prompt, S slots, R read-outs, D width of the LLM.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prompt import Prompt
from trainer.nn.llm.linear_layers import dequantized, quantized_layers
from trainer.nn.pretrained import LLMError, first_line

_ROWS = 64
"""Rows of the token table that the prompts use."""
_WINDOW = 6
"""Keys that a query of a layer with a sliding window sees in the check; the prompts are longer."""
_MAX_LAYERS = 8
_MAX_COPIED = 1 << 30
"""Parameters that are copied in fp32 at most, beyond the first layer: experts of one layer can be a billion."""
_TOLERANCE = 1e-3
"""Largest difference relative to the standard deviation of the hidden states; rounding in fp32 is below 1e-5."""
_CURE = (
    "set system.llm.path to a decoder with causal attention alone, such as Llama, Mistral, Qwen3 or Gemma 3 "
    "(docs/language_models.md)"
)


def first_layers(settings: Any, count: int) -> None:
    """Make the configuration that of a model with the first `count` layers."""
    settings.num_hidden_layers = count
    if getattr(settings, "layer_types", None):
        # Where it cannot be set, transformers computes it from the number of layers.
        with contextlib.suppress(AttributeError):
            settings.layer_types = settings.layer_types[:count]


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers, under any of the names that transformers has for them.

    Raises:
        LLMError: it has none.
    """
    for name in ("layers", "h", "blocks", "decoder.layers"):
        try:
            found = decoder.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList) and len(found):
            return found
    raise LLMError(f"a {type(decoder).__name__} has no list of layers that this trainer knows; {_CURE}")


def check_packing(decoder: PreTrainedModel, path: str, run: Callable[[PreTrainedModel], nn.Module]) -> None:
    """Check that the first layers of `decoder` give packed prompts what each prompt gets alone.

    Args:
        decoder: as loaded; it is not changed.
        run: wraps a decoder as training will run it.

    Raises:
        LLMError: they differ, or the decoder does not run; the message names what the decoder does.
    """

    def refusal(what: str) -> LLMError:
        traits = ", ".join(_traits(decoder))
        kind = f"a '{decoder.config.model_type}'" + (f" ({traits})" if traits else "")
        return LLMError(f"{path} holds {kind}, {what}; {_CURE}")

    try:
        shallow = _first_layers(decoder)
        prompts = _prompts()
        vector_SD = _vectors(shallow, sum(len(prompt.slot_S) for prompt in prompts))
        apart_RD = _apart(shallow, prompts, vector_SD)
    except Exception as error:  # transformers and the code of models raise anything
        raise refusal(f"which cannot be run from embeddings ({_reason(error)})") from error
    try:
        llm = run(shallow)
        packed_RD = _packed(llm, pack(prompts), vector_SD)
    except Exception as error:
        raise refusal(f"which cannot be run on packed prompts ({_reason(error)})") from error
    worst = float((packed_RD - apart_RD).abs().max() / apart_RD.std())
    if not worst <= _TOLERANCE:  # NaN, too
        raise refusal(f"whose hidden states for packed prompts are not those of each prompt alone (off by {worst:.2g})")


def _first_layers(decoder: PreTrainedModel) -> PreTrainedModel:
    """A copy in fp32 of the first layers, as many as show each kind of layer, with a small token table."""
    layers = decoder_layers(decoder)
    table = decoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    row = torch.linspace(0, table.num_embeddings - 1, _ROWS, device=table.weight.device).long()
    with torch.no_grad():
        # As the model gives them: Gemma scales its embeddings in the table's forward.
        small = nn.Embedding(_ROWS, table.embedding_dim, _weight=table(row).float().cpu())
    kept = _representative(decoder, layers)
    # What is in the memo is not copied: the table and the layers behind.
    memo: dict[int, Any] = {id(layer): layer for layer in layers[kept:]} | {id(table): small}
    memo |= {id(module): dequantized(module) for module in quantized_layers(layers[:kept])}
    shallow: PreTrainedModel = copy.deepcopy(decoder, memo)
    del decoder_layers(shallow)[kept:]
    first_layers(shallow.config, kept)
    for owner in (shallow.config, *shallow.modules()):
        _shorten_window(owner)
    nn.Module.float(shallow)  # transformers' own refuses a model that was quantized
    shallow.train(False)
    return shallow


def _shorten_window(owner: Any) -> None:
    """Let a configuration or an attention layer with a sliding window see few keys."""
    if isinstance(getattr(owner, "sliding_window", None), int):
        owner.sliding_window = _WINDOW


def _representative(decoder: PreTrainedModel, layers: nn.ModuleList) -> int:
    """Number of first layers that hold each kind of layer once, at least two."""
    kinds = getattr(decoder.config, "layer_types", None) or [""] * len(layers)
    seen: set[object] = set()
    kept, parameters = 1, 0
    for index, (kind, layer) in enumerate(zip(kinds, layers, strict=False), 1):
        parameters += sum(parameter.numel() for parameter in layer.parameters())
        if index > _MAX_LAYERS or (index > 1 and parameters > _MAX_COPIED):
            break
        signature = (kind, *(type(module).__name__ for module in layer.modules()))
        if signature not in seen or index == 2:
            kept = index
        seen.add(signature)
    return kept


def _prompts() -> list[Prompt]:
    """Two prompts with a common beginning, read out from their first slot to the end."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, _ROWS, 9)
    prompts = []
    for length, slots in ((21, [11, 15]), (17, [10, 13])):
        token_T = np.concatenate([common, rng.integers(0, _ROWS, length - len(common))])
        prompts.append(Prompt(token_T, np.array(slots), np.ones(len(slots), np.int64), np.arange(slots[0], length)))
    return prompts


def _vectors(decoder: PreTrainedModel, slots: int) -> Tensor:
    """(S, D) vectors to inject, of the size of token embeddings."""
    table: Any = decoder.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    vector_SD: Tensor = torch.randn(slots, table.embedding_dim, generator=generator) * table.weight.std()
    return vector_SD


@torch.no_grad()
def _apart(decoder: PreTrainedModel, prompts: list[Prompt], vector_SD: Tensor) -> Tensor:
    """(R, D) hidden states at the read-outs of each prompt alone, by the model's own eager attention."""
    attention = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    table: Any = decoder.get_input_embeddings()
    read, first = [], 0
    for prompt in prompts:
        embedding_TD = table(torch.from_numpy(prompt.token_T)).clone()
        embedding_TD[prompt.slot_S] = vector_SD[first : first + len(prompt.slot_S)]
        first += len(prompt.slot_S)
        hidden_1TD = decoder(inputs_embeds=embedding_TD[None], use_cache=False).last_hidden_state
        read.append(hidden_1TD[0, torch.from_numpy(prompt.readout_R)])
    decoder.config._attn_implementation = attention
    return torch.cat(read)


@torch.no_grad()
def _packed(llm: nn.Module, packed: PackedPrompts, vector_SD: Tensor) -> Tensor:
    """(R, D) hidden states at the same read-outs, packed."""
    read_RD: Tensor = llm(packed, vector_SD)
    return read_RD


def _traits(decoder: PreTrainedModel) -> Iterator[str]:
    """Traits of a decoder besides causal attention within a prompt, as far as its modules and settings tell."""
    modules, config = list(decoder.modules()), decoder.config
    names = {type(module).__name__.lower() for module in modules}

    def named(*words: str) -> bool:
        return any(word in name for name in names for word in words)

    if named("mamba", "rglru") or any(key.startswith("mamba_") for key in vars(config)):
        yield "state space layers"
    elif named("linearattention", "lightning", "deltanet", "deltaattention", "kda", "rwkv"):
        yield "linear attention"
    elif named("shortconv") or any(isinstance(module, nn.Conv1d) for module in modules):
        yield "convolution over tokens"
    if any(hasattr(module, "sinks") for module in modules):
        yield "attention sinks"
    if named("diffllama"):
        yield "differential attention"
    if getattr(config, "use_bidirectional_attention", None):
        yield "bidirectional attention"
    if getattr(config, "attention_chunk_size", None):
        yield f"attention in chunks of {config.attention_chunk_size} tokens"
    if getattr(config, "hidden_size_per_layer_input", None):
        yield "inputs of each layer from token ids"
    if getattr(config, "alibi", None) or named("bloom", "mpt"):
        yield "ALiBi"


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError) and "'segments'" in str(error):
        return "its layers do not pass their arguments on to attention"
    return f"{type(error).__name__}: {first_line(error)[:120]}"
