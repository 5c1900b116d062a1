"""What a language model costs, counted from its shape: parameters, FLOPs, bytes. No torch: a login node can count.

Of the FLOPs, those that grow with tokens are counted: the matrix products of the decoder layers and of attention.
Embedding look-ups, norms and the small trained parts are below 1 % for any language model worth planning for.

Letters: N matmul parameters of all layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class LLMShape:
    """A decoder of the Llama kind: grouped attention, gated feed-forward, two RMS norms a layer."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    attention_bias: bool = False
    """Queries, keys and values have a bias."""
    output_bias: bool = False

    @classmethod
    def of_folder(cls, path: Path, layers: int | None = None) -> Self:
        """The shape that `path/config.json` tells, cut to the first `layers` layers.

        Raises:
            ValueError: no such file, or not a decoder of this kind.
        """
        file = path / "config.json"
        if not file.is_file():
            raise ValueError(f"{file} does not exist: copy the model's config.json there (no weights needed)")
        try:
            settings: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        return cls.of_settings(settings, str(file), layers)

    @classmethod
    def of_settings(cls, settings: dict[str, Any], source: str, layers: int | None = None) -> Self:
        """The shape that the content of a config.json tells; `source` names it in errors."""
        if missing := [key for key in _NEEDED if not isinstance(settings.get(key), int)]:
            raise ValueError(
                f"{source} has no {missing[0]}: only decoders of the Llama kind (Llama, Mistral, Qwen, Gemma, SmolLM) "
                "can be planned"
            )
        heads = settings["num_attention_heads"]
        bias = bool(settings.get("attention_bias", False))
        shape = cls(
            width=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
            intermediate=settings["intermediate_size"],
            vocabulary=settings["vocab_size"],
            # Qwen2 has these biases and no key that says so.
            attention_bias=bias or settings.get("model_type") == "qwen2",
            output_bias=bias,
        )
        return replace(shape, layers=min(layers, shape.layers) if layers else shape.layers)

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out, in) of the weight matrices of one layer: query, key, value, output, gate, up, down."""
        attended, stored = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (attended, self.width), (stored, self.width), (stored, self.width), (self.width, attended),
            (self.intermediate, self.width), (self.intermediate, self.width), (self.width, self.intermediate),
        ]  # fmt: skip

    @property
    def matmul_parameters(self) -> int:
        """N: weights that each token is multiplied with, over all layers."""
        return self.layers * sum(rows * columns for rows, columns in self.linear_shapes)

    @property
    def parameters(self) -> int:
        """All weights that are loaded: token table, layers, norms. There is no LM head in training."""
        attended, stored = self.heads * self.head_dim, self.kv_heads * self.head_dim
        vectors = 2 * self.width + self.attention_bias * (attended + 2 * stored) + self.output_bias * self.width
        return self.vocabulary * self.width + self.matmul_parameters + self.layers * vectors + self.width

    def weight_bytes(self, element: int, *, int8: bool) -> int:
        """All weights; `int8` stores the matrices of the layers in one byte a weight, with one fp32 scale a row."""
        if not int8:
            return self.parameters * element
        scales = 4 * self.layers * sum(rows for rows, _ in self.linear_shapes)
        return (self.parameters - self.matmul_parameters) * element + self.matmul_parameters + scales


@dataclass(frozen=True)
class Load:
    """What one pass over a packed batch asks of the decoder (see `trainer/data/packing.py`)."""

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
    """Keys and values of the tokens run without gradient."""
    workspace: int
    """What lives only inside a layer."""

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


def forward_flops(shape: LLMShape, load: Load) -> float:
    """FLOPs that one forward pass runs. The last layer's feed-forward part runs at the read-outs alone."""
    feed_forward = 3 * shape.width * shape.intermediate
    skipped = 2.0 * (load.run - load.readouts) * feed_forward
    linear = 2.0 * shape.matmul_parameters * load.run - skipped
    return linear + _attention(shape, load.frozen_pairs + load.trained_pairs)


def backward_flops(shape: LLMShape, load: Load) -> float:
    """FLOPs of the backward pass: one product a weight for the gradient of its input, none for that of the weight.

    Fused attention computes the scores once more: five products for the forward's two.
    """
    feed_forward = 3 * shape.width * shape.intermediate
    linear = 2.0 * shape.matmul_parameters * load.trained - 2.0 * (load.trained - load.readouts) * feed_forward
    return linear + 2.5 * _attention(shape, load.trained_pairs)


def saved_bytes(shape: LLMShape, load: Load, element: int) -> int:
    """Activations saved for the backward pass.

    A layer saves the input of both norms in fp32; queries, keys, values, mask and output of attention; the two inputs
    of the gated product and that of its non-linearity. Linear layers save nothing, for their weights are frozen.

    Args:
        element: bytes of an activation.
    """
    norm = shape.width * 4
    fed = 3 * shape.intermediate * element
    # Of the mask torch makes numbers, anew in each layer.
    attention = (
        2 * shape.heads * shape.head_dim * load.queries + 2 * shape.kv_heads * shape.head_dim * load.keys
    ) + load.trained_pairs
    whole = (2 * norm + fed) * load.trained + attention * element
    return shape.layers * whole - (norm + fed) * (load.trained - load.readouts)


def rank_bytes(
    shape: LLMShape,
    load: Load,
    *,
    element: int,
    trained_parameters: int,
    zero_stage: int,
    devices: int,
    int8: bool = False,
) -> Bytes:
    """The most that a rank holds during a training step.

    Trained parameters, gradients and Adam's two moments are fp32. ZeRO-1 splits the moments, and keeps a second copy
    of the parameters that it splits too; ZeRO-2 also splits the gradients, ZeRO-3 everything (DeepSpeed's
    `stage_1_and_2.py` and `stage3.py`).
    """
    whole, split = {0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 16)}[zero_stage]
    weights = shape.weight_bytes(element, int8=int8) // (devices if zero_stage == 3 else 1)
    if zero_stage == 3:  # the layer that runs is whole, and the next one is on its way
        weights += 2 * shape.matmul_parameters // shape.layers * element
    widest = 3 * shape.intermediate + 4 * shape.width
    return Bytes(
        frozen_weights=weights,
        trained=trained_parameters * whole + trained_parameters * split // devices,
        activations=saved_bytes(shape, load, element),
        prefix_keys=2 * shape.layers * shape.kv_heads * shape.head_dim * load.frozen * element,
        workspace=widest * max(load.frozen, load.trained) * element,
    )


def trained_parameters(width: int, *, teacher_dim: int, hidden_dim: int, projected_dim: int) -> int:
    """What LLM-SRec trains: f_I, f_user, f_item, f_CF-user and two tokens (see `trainer/nn/projectors.py`)."""
    item_projector = _linear(teacher_dim, width) + 2 * width + _linear(width, width)
    readout_head = _linear(width, hidden_dim) + 2 * hidden_dim + _linear(hidden_dim, projected_dim)
    teacher_head = _linear(teacher_dim, projected_dim) + 2 * projected_dim + _linear(projected_dim, projected_dim)
    return item_projector + 2 * readout_head + teacher_head + 2 * width


def _linear(inner: int, outer: int) -> int:
    return inner * outer + outer


def _attention(shape: LLMShape, pairs: float) -> float:
    return 4.0 * shape.layers * shape.heads * shape.head_dim * pairs
