"""What a language model costs, counted from its shape: parameters, FLOPs, bytes. No torch: a login node can count.

Only what grows with tokens is counted, the matrix products of the decoder layers and of attention. Embedding look-ups,
norms and the small trained parts are below 1 % of the FLOPs of any language model worth planning for.

Letters: D width, N matmul parameters of all layers, T tokens of a prompt.
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


def attention_flops(shape: LLMShape, lengths: Sequence[int]) -> float:
    """Forward FLOPs of causal attention within prompts of these lengths: scores and mix, 2 FLOPs a multiply-add."""
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return 4.0 * shape.layers * shape.heads * shape.head_dim * pairs


def useful_step_flops(shape: LLMShape, lengths: Sequence[int]) -> float:
    """FLOPs of a step by 4N: frozen weights need 2N forward and 2N backward a token, and no weight gradient.

    Attention has no frozen operand, so its backward is twice its forward.
    """
    return 4.0 * shape.matmul_parameters * sum(lengths) + 3.0 * attention_flops(shape, lengths)
