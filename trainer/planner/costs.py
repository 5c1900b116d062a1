"""FLOPs and bytes of running and training around a language model, from its shape. Torch-free, for login nodes.

FLOPs are those of the matrix products of the decoder layers, of attention and of the LM head, which grow with tokens.
Embedding look-ups, norms and the small trained parts are below 1 % for any language model worth planning for.

Letters: N matmul parameters of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.planner.llm_shape import FEED_FORWARD, Adapters, LLMShape


@dataclass(frozen=True)
class Load:
    """The decoder's work in one pass over a packed batch (see `trainer/data/prompts/packing.py`)."""

    useful: int
    """Tokens of the prompts, had each been run alone."""
    frozen: int
    """Tokens of the frozen stream, run without gradient."""
    trained: int
    """Tokens of the trained stream, run with gradient (in training), padding of rows included."""
    frozen_pairs: int
    """Query-key pairs of the frozen stream's attention, padding of its groups included."""
    trained_pairs: int
    """Query-key pairs of the trained stream's attention, padding of its groups included."""
    queries: int
    """Queries of the trained stream's attention, padding of its groups included."""
    keys: int
    """Keys of the trained stream's attention, padding of its groups included."""
    readouts: int
    """Positions whose hidden state is used."""
    cached: int = 0
    """Tokens whose keys and values are read from a prefix cache."""
    logits: int = 0
    """Tokens whose logits the LM head computes: those of answers."""
    logits_at_once: int = 0
    """Tokens whose logits are computed together."""
    varlen: bool = False
    """Whether a variable-length kernel runs attention: one call, in which nothing is padded, repeated or masked."""

    @property
    def run(self) -> int:
        """Tokens run, with and without gradient."""
        return self.frozen + self.trained


@dataclass(frozen=True)
class Bytes:
    """Memory of one rank in bytes, by part."""

    frozen_weights: int
    trained: int
    """Trained parameters, their gradients and Adam's moments."""
    activations: int
    """Activations saved for the backward pass."""
    prefix_keys: int
    """KV cache of the tokens that run without gradient or are read from a prefix cache."""
    workspace: int
    """Temporary tensors inside a layer or the LM head."""

    @property
    def total(self) -> int:
        return self.frozen_weights + self.trained + self.activations + self.prefix_keys + self.workspace


def useful_step_flops(shape: LLMShape, lengths: Sequence[int]) -> float:
    """FLOPs of a training step on prompts of these lengths, each run alone: 4N per token, and attention.

    Frozen weights need 2N forward and 2N backward per token, and no weight gradient. Attention has no frozen operand,
    so its backward is twice its forward; its forward is scores and mix, 4 FLOPs per query-key pair and dimension.
    """
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return 4.0 * shape.matmul_parameters * sum(lengths) + 3.0 * _attention_flops(shape, pairs)


def forward_flops(shape: LLMShape, load: Load, adapters: Adapters | None = None) -> float:
    """FLOPs of one forward pass. The last layer's feed-forward part runs at the read-outs only."""
    linear = linear_flops(shape, load)
    adapted = _matmul_flops(shape, _adapter_parameters(shape, adapters), load.run, load.readouts)
    attention = _attention_flops(shape, load.frozen_pairs + load.trained_pairs)
    return linear + adapted + attention + _head_flops(shape, load)


def backward_flops(shape: LLMShape, load: Load, adapters: Adapters | None = None) -> float:
    """FLOPs of the backward pass: one product per weight for the gradient of its input, none for that of the weight.

    Adapters, which are trained, need a second product per weight. Fused attention recomputes the scores: five products
    for the forward's two.
    """
    linear = _matmul_flops(shape, _matrices(shape), load.trained, load.readouts)
    adapted = 2 * _matmul_flops(shape, _adapter_parameters(shape, adapters), load.trained, load.readouts)
    return linear + adapted + 2.5 * _attention_flops(shape, load.trained_pairs) + _head_flops(shape, load)


def recompute_flops(shape: LLMShape, load: Load, adapters: Adapters | None = None) -> float:
    """FLOPs of recomputing activations: all that runs with gradient, except products whose result is not saved."""
    recomputed, adapted = _matrices(shape), _adapter_parameters(shape, adapters)
    if "down_proj" not in adapted:  # nothing behind it is saved then, so recomputation stops before it
        del recomputed["down_proj"]
    linear = _matmul_flops(shape, recomputed, load.trained, load.readouts)
    beside = _matmul_flops(shape, adapted, load.trained, load.readouts)
    return linear + beside + _attention_flops(shape, load.trained_pairs)


def saved_bytes(shape: LLMShape, load: Load, element: int, adapters: Adapters | None = None) -> int:
    """Bytes of the activations saved for the backward pass.

    A layer saves the input of both norms; queries, keys, values, mask and output of attention; the two inputs of the
    gated product. Unfused parts save the norms' input in fp32, and the input of the non-linearity too. Frozen linear
    layers save nothing. An adapter saves the input of both its matrices in fp32; its dropout, whose mask is recomputed,
    saves nothing.

    Args:
        element: bytes per activation.
    """
    attention, feed_forward = _layer_bytes(shape, load, element, adapters)
    # The last layer's feed-forward part runs at the read-outs only.
    return shape.layers * attention + feed_forward * ((shape.layers - 1) * load.trained + load.readouts)


def recomputed_bytes(shape: LLMShape, load: Load, element: int, adapters: Adapters | None = None) -> int:
    """Peak bytes of activations when they are recomputed: the inputs of all layers, and everything of one layer."""
    attention, feed_forward = _layer_bytes(shape, load, element, adapters)
    return shape.layers * shape.width * element * load.trained + attention + feed_forward * load.trained


def _layer_bytes(shape: LLMShape, load: Load, element: int, adapters: Adapters | None) -> tuple[int, int]:
    """Bytes that one layer saves: of its attention part in total, and of its feed-forward part per token."""
    norm = shape.width * (element if shape.fused else 4)
    kept = 2 * shape.heads * shape.head_dim * load.queries + 2 * shape.kv_heads * shape.head_dim * load.keys
    # Beside them, a sum per query and head in fp32; or one element per pair for the mask, which torch converts from
    # booleans again in each layer.
    beside = 4 * shape.heads * load.queries if load.varlen else load.trained_pairs * element
    adapted = {name: _adapter_bytes(shape, adapters, name) for name in adapters.targets} if adapters else {}
    adapted_feed_forward = sum(size for name, size in adapted.items() if name in FEED_FORWARD)
    attention = (norm + sum(adapted.values()) - adapted_feed_forward) * load.trained + kept * element + beside
    # Experts are matrices of a module of their own, whose gated products are not fused.
    fed = (2 if shape.fused and not shape.experts else 3) * shape.intermediate * element
    if shape.experts:  # outputs of the chosen experts, which their weights in the sum are multiplied with
        fed += shape.experts.used * shape.width * element
    return attention, norm + fed + adapted_feed_forward


def _adapter_bytes(shape: LLMShape, adapters: Adapters, name: str) -> int:
    """Bytes that the adapter of one linear layer saves per token."""
    return 4 * (shape.linear[name][1] + adapters.rank)  # fp32


def rank_bytes(
    shape: LLMShape,
    load: Load,
    *,
    element: int,
    trained_parameters: int,
    zero_stage: int,
    devices: int,
    one_byte: bool = False,
    recompute: bool = False,
    adapters: Adapters | None = None,
    loss: int = 0,
) -> Bytes:
    """Peak memory of a rank in a training step.

    Trained parameters, gradients and Adam's two moments are fp32. ZeRO-1 shards the moments and a second copy of the
    parameters that it keeps; ZeRO-2 also shards the gradients, ZeRO-3 everything (DeepSpeed's `stage_1_and_2.py` and
    `stage3.py`).

    Args:
        element: bytes of a weight or activation.
        devices: number of ranks that ZeRO shards over.
        one_byte: the weights of linear layers take one byte each (int8, fp8).
        recompute: activations are recomputed in the backward pass.
        loss: bytes that computing the loss takes, with all activations saved and no layer running.
    """
    # Bytes per trained parameter: held by every rank, and sharded.
    unsharded, sharded = {0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 16)}[zero_stage]
    weights = shape.weight_bytes(element, one_byte=one_byte) // (devices if zero_stage == 3 else 1)
    if zero_stage == 3:  # the running layer is gathered, and the next one is prefetched
        weights += 2 * shape.layer_parameters * element
    widest = 3 * shape.intermediate + 4 * shape.width
    # fp32: all logits, and two gradients of those computed at once. Freed before the backward pass of the layers, hence
    # the maximum with `widest` below.
    logits = 4 * shape.vocabulary * (load.logits + 2 * load.logits_at_once)
    activations = (recomputed_bytes if recompute else saved_bytes)(shape, load, element, adapters)
    if zero_stage == 3:
        activations += _linear_input_bytes(shape, load, element, layers=1 if recompute else shape.layers)
    # A pass converts quantized weights to the dtype of the activations, one matrix at a time.
    unpacked = max(_matrices(shape).values()) * element if one_byte else 0
    return Bytes(
        frozen_weights=weights,
        trained=trained_parameters * unsharded + trained_parameters * sharded // devices,
        activations=activations,
        prefix_keys=2 * shape.layers * shape.kv_heads * shape.head_dim * (load.frozen + load.cached) * element,
        workspace=max(widest * max(load.frozen, load.trained) * element, logits, loss) + unpacked,
    )


def _linear_input_bytes(shape: LLMShape, load: Load, element: int, *, layers: int) -> int:
    """Bytes of the inputs of linear layers, which ZeRO-3's own linear layer saves although the weights are frozen
    (DeepSpeed's `linear.py`): the outputs of both norms, and the gated product. Attention saves its output anyway."""
    fed = (layers - 1) * load.trained + load.readouts if layers == shape.layers else layers * load.trained
    return element * (shape.width * layers * load.trained + (shape.width + shape.intermediate) * fed)


def _matrices(shape: LLMShape) -> dict[str, int]:
    """Weights of each linear layer of one decoder layer, by name."""
    return {name: rows * columns for name, (rows, columns) in shape.linear.items()}


def _adapter_parameters(shape: LLMShape, adapters: Adapters | None) -> dict[str, int]:
    """Weights of the adapters of one decoder layer, by the name of the linear layer."""
    return {name: adapters.of_layer(shape, name) for name in adapters.targets} if adapters else {}


def linear_flops(shape: LLMShape, load: Load) -> float:
    """FLOPs of the frozen linear layers in one forward pass."""
    return _matmul_flops(shape, _matrices(shape), load.run, load.readouts)


def elements(shape: LLMShape, sizes: Mapping[str, int], tokens: int, readouts: int) -> float:
    """Sum over tokens and decoder layers of something that has this size at each linear layer."""
    # The last layer's feed-forward part runs at the read-outs only.
    skipped = (tokens - readouts) * sum(sizes.get(name, 0) for name in FEED_FORWARD)
    return float(shape.layers * tokens * sum(sizes.values()) - skipped)


def _matmul_flops(shape: LLMShape, weights: Mapping[str, int], tokens: int, readouts: int) -> float:
    """FLOPs of multiplying every token once with these weights in each layer."""
    return 2.0 * elements(shape, weights, tokens, readouts)


def _head_flops(shape: LLMShape, load: Load) -> float:
    """FLOPs of the LM head, forward or backward: its weights are frozen."""
    return 2.0 * shape.width * shape.vocabulary * load.logits


def _attention_flops(shape: LLMShape, pairs: float) -> float:
    """FLOPs of attention's forward pass over this many query-key pairs."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * pairs
