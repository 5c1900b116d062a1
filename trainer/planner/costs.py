"""What a language model costs, counted from its shape: parameters, FLOPs, bytes. No torch: a login node can count.

Of the FLOPs, those that grow with tokens are counted: the matrix products of the decoder layers, of attention and of
the LM head.
Embedding look-ups, norms and the small trained parts are below 1 % for any language model worth planning for.

Letters: N matmul parameters of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.planner.llm_shape import FEED_FORWARD, Adapters, LLMShape


@dataclass(frozen=True)
class Load:
    """What one pass over a packed batch asks of the decoder (see `trainer/data/prompts/packing.py`)."""

    useful: int
    """Tokens of the prompts, had each been run alone."""
    frozen: int
    """Tokens run without gradient."""
    trained: int
    """Tokens run with gradient (in training), padding of rows included."""
    frozen_pairs: int
    """Query-key pairs that attention computes, padding of its groups included."""
    trained_pairs: int
    queries: int
    """Queries and keys of the trained attention, padding of its groups included."""
    keys: int
    readouts: int
    cached: int = 0
    """Rows read from a title store."""
    logits: int = 0
    """Tokens whose logits the LM head makes: those of answers."""
    logits_at_once: int = 0

    @property
    def run(self) -> int:
        """Tokens run."""
        return self.frozen + self.trained


@dataclass(frozen=True)
class Bytes:
    """Memory of one rank, by part."""

    frozen_weights: int
    trained: int
    """Trained parameters, their gradients and Adam's moments."""
    activations: int
    """Saved for the backward pass."""
    prefix_keys: int
    """Keys and values of the tokens that are run without gradient or read from a title store."""
    workspace: int
    """What lives only inside a layer or the LM head."""

    @property
    def total(self) -> int:
        return self.frozen_weights + self.trained + self.activations + self.prefix_keys + self.workspace


def useful_step_flops(shape: LLMShape, lengths: Sequence[int]) -> float:
    """FLOPs of a step by 4N, for prompts of these lengths.

    Frozen weights need 2N forward and 2N backward a token, and no weight gradient. Attention has no frozen operand, so
    its backward is twice its forward; its forward is scores and mix, 4 FLOPs a query-key pair and dimension.
    """
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return 4.0 * shape.matmul_parameters * sum(lengths) + 3.0 * _attention(shape, pairs)


def forward_flops(shape: LLMShape, load: Load, adapters: Adapters | None = None) -> float:
    """FLOPs that one forward pass runs. The last layer's feed-forward part runs at the read-outs alone."""
    linear = _products(shape, _matrices(shape), load.run, load.readouts)
    beside = _products(shape, _small(shape, adapters), load.run, load.readouts)
    return linear + beside + _attention(shape, load.frozen_pairs + load.trained_pairs) + _head(shape, load)


def backward_flops(shape: LLMShape, load: Load, adapters: Adapters | None = None) -> float:
    """FLOPs of the backward pass: one product a weight for the gradient of its input, none for that of a frozen weight.

    Adapters have a second product a weight. Fused attention computes the scores once more: five products for the
    forward's two.
    """
    linear = _products(shape, _matrices(shape), load.trained, load.readouts)
    beside = 2 * _products(shape, _small(shape, adapters), load.trained, load.readouts)
    return linear + beside + 2.5 * _attention(shape, load.trained_pairs) + _head(shape, load)


def recompute_flops(shape: LLMShape, load: Load, adapters: Adapters | None = None) -> float:
    """FLOPs of computing activations again: all that runs with gradient, but for products whose result nobody saves."""
    needed, small = _matrices(shape), _small(shape, adapters)
    if "down_proj" not in small:
        del needed["down_proj"]
    linear = _products(shape, needed, load.trained, load.readouts)
    return linear + _products(shape, small, load.trained, load.readouts) + _attention(shape, load.trained_pairs)


def saved_bytes(shape: LLMShape, load: Load, element: int, adapters: Adapters | None = None) -> int:
    """Activations saved for the backward pass.

    A layer saves the input of both norms; queries, keys, values, mask and output of attention; the two inputs of the
    gated product. Parts that are not fused save the norms' input in fp32, and that of the non-linearity. Frozen linear
    layers save nothing. An adapter saves the input of both its matrices in fp32, and what its dropout kept.

    Args:
        element: bytes of an activation.
    """
    trunk, fed = _layer_bytes(shape, load, element, adapters)
    return (shape.layers * trunk + (shape.layers - 1) * fed * load.trained) + fed * load.readouts


def recomputed_bytes(shape: LLMShape, load: Load, element: int, adapters: Adapters | None = None) -> int:
    """The most that is held when activations are computed again: the inputs of all layers, and all of one layer."""
    trunk, fed = _layer_bytes(shape, load, element, adapters)
    return shape.layers * shape.width * element * load.trained + trunk + fed * load.trained


def _layer_bytes(shape: LLMShape, load: Load, element: int, adapters: Adapters | None) -> tuple[int, int]:
    """What one layer saves up to the attention's output, and of each token behind it."""
    norm = shape.width * (element if shape.fused else 4)
    # Of the mask torch makes numbers, anew in each layer.
    attention = (
        2 * shape.heads * shape.head_dim * load.queries + 2 * shape.kv_heads * shape.head_dim * load.keys
    ) + load.trained_pairs
    beside = {name: _adapter_bytes(shape, adapters, name) for name in adapters.targets} if adapters else {}
    behind = sum(size for name, size in beside.items() if name in FEED_FORWARD)
    trunk = (norm + sum(beside.values()) - behind) * load.trained + attention * element
    return trunk, norm + (2 if shape.fused else 3) * shape.intermediate * element + behind


def _adapter_bytes(shape: LLMShape, adapters: Adapters, name: str) -> int:
    """What the adapter of one linear layer saves of a token."""
    inner = shape.linear[name][1]
    return (4 + adapters.dropout) * inner + 4 * adapters.rank


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
) -> Bytes:
    """The most that a rank holds during a training step.

    Trained parameters, gradients and Adam's two moments are fp32. ZeRO-1 splits the moments, and keeps a second copy
    of the parameters that it splits too; ZeRO-2 also splits the gradients, ZeRO-3 everything (DeepSpeed's
    `stage_1_and_2.py` and `stage3.py`).
    """
    whole, split = {0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 16)}[zero_stage]
    weights = shape.weight_bytes(element, one_byte=one_byte) // (devices if zero_stage == 3 else 1)
    if zero_stage == 3:  # the layer that runs is whole, and the next one is on its way
        weights += 2 * shape.matmul_parameters // shape.layers * element
    widest = 3 * shape.intermediate + 4 * shape.width
    # In fp32, all of them, and of those made at once two gradients: gone before the backward of the layers begins.
    logits = 4 * shape.vocabulary * (load.logits + 2 * load.logits_at_once)
    activations = recomputed_bytes if recompute else saved_bytes
    return Bytes(
        frozen_weights=weights,
        trained=trained_parameters * whole + trained_parameters * split // devices,
        activations=activations(shape, load, element, adapters),
        prefix_keys=2 * shape.layers * shape.kv_heads * shape.head_dim * (load.frozen + load.cached) * element,
        workspace=max(widest * max(load.frozen, load.trained) * element, logits),
    )


def _matrices(shape: LLMShape) -> dict[str, int]:
    return {name: rows * columns for name, (rows, columns) in shape.linear.items()}


def _small(shape: LLMShape, adapters: Adapters | None) -> dict[str, int]:
    return {name: adapters.of_layer(shape, name) for name in adapters.targets} if adapters else {}


def _products(shape: LLMShape, weights: Mapping[str, int], tokens: int, readouts: int) -> float:
    """FLOPs of multiplying every token once with these weights of each layer."""
    skipped = (tokens - readouts) * sum(weights.get(name, 0) for name in FEED_FORWARD)
    return 2.0 * (shape.layers * tokens * sum(weights.values()) - skipped)


def _head(shape: LLMShape, load: Load) -> float:
    """FLOPs of the LM head, whose weights are frozen, in one direction."""
    return 2.0 * shape.width * shape.vocabulary * load.logits


def _attention(shape: LLMShape, pairs: float) -> float:
    return 4.0 * shape.layers * shape.heads * shape.head_dim * pairs
