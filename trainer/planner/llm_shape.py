"""The shape of a language model, from its config.json: parameters and bytes. Torch-free, for login nodes.

Letters: N matmul parameters of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from shards.manifest import parse_json

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
"""Linear layers that run at the read-outs only in the last decoder layer."""
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", *FEED_FORWARD)
_OPTIONAL = ("num_key_value_heads", "head_dim")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class LLMShape:
    """A decoder of the Llama kind: grouped-query attention, gated feed-forward, two RMS norms per layer."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    attention_bias: bool = False
    """Whether queries, keys and values have a bias."""
    output_bias: bool = False
    """Whether the output projection of attention has a bias."""
    fused: bool = True
    """Whether norms and gated products are fused, as in `trainer/nn/llm/fused.py`."""
    own_head: bool = False
    """Whether an LM head that is not tied to the token table is loaded too."""

    @classmethod
    def of_folder(cls, path: Path, layers: int | None = None, *, with_head: bool = False) -> Self:
        """Read the shape from `path/config.json`, cut to the first `layers` layers.

        Args:
            with_head: tokens are predicted, which needs the LM head.

        Raises:
            ValueError: the file does not exist, is not JSON, or is not of a decoder of this kind.
        """
        file = path / "config.json"
        if not file.is_file():
            raise ValueError(f"{file} does not exist: copy the model's config.json there (no weights needed)")
        try:
            settings: Any = parse_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{file} is not a JSON object: copy the model's config.json there")
        return cls.of_settings(settings, str(file), layers, with_head=with_head)

    @classmethod
    def of_settings(
        cls, settings: dict[str, Any], source: str, layers: int | None = None, *, with_head: bool = False
    ) -> Self:
        """Read the shape from the content of a config.json; `source` names it in errors.

        Raises:
            ValueError: it is not of a decoder of this kind.
        """
        if missing := [key for key in _NEEDED if not isinstance(settings.get(key), int)]:
            raise ValueError(
                f"{source} has no {missing[0]}: only decoders of the Llama kind (Llama, Mistral, Qwen, Gemma, SmolLM) "
                "can be planned"
            )
        for key in (*_NEEDED, *(key for key in _OPTIONAL if settings.get(key) is not None)):
            value = settings[key]
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise ValueError(f"{source} has {key}={str(value)[:30]}: correct it to a number from 1 on")
        heads = settings["num_attention_heads"]
        bias = bool(settings.get("attention_bias", False))
        family = str(settings.get("model_type"))
        # Without the key, transformers ties the embeddings of Gemma only.
        tied = settings.get("tie_word_embeddings", family.startswith("gemma"))
        shape = cls(
            width=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
            intermediate=settings["intermediate_size"],
            vocabulary=settings["vocab_size"],
            # Qwen2 has these biases, but no key for them.
            attention_bias=bias or family == "qwen2",
            output_bias=bias,
            fused=settings.get("hidden_act", "silu") == "silu",
            own_head=with_head and not tied,
        )
        return replace(shape, layers=min(layers, shape.layers) if layers else shape.layers)

    @property
    def linear(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) shapes of the weight matrices of one layer, by name."""
        attended, cached = self.heads * self.head_dim, self.kv_heads * self.head_dim
        fed = dict.fromkeys(FEED_FORWARD, (self.intermediate, self.width))
        return {
            "q_proj": (attended, self.width), "k_proj": (cached, self.width), "v_proj": (cached, self.width),
            "o_proj": (self.width, attended), **fed, "down_proj": (self.width, self.intermediate),
        }  # fmt: skip

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out, in) shapes of the weight matrices of one layer."""
        return list(self.linear.values())

    @property
    def matmul_parameters(self) -> int:
        """N: weights that each token is multiplied with, in all layers."""
        return self.layers * sum(rows * columns for rows, columns in self.linear_shapes)

    @property
    def parameters(self) -> int:
        """All weights that are loaded: token table, layers, norms, and an untied LM head if tokens are predicted."""
        attended, cached = self.heads * self.head_dim, self.kv_heads * self.head_dim
        vectors = 2 * self.width + self.attention_bias * (attended + 2 * cached) + self.output_bias * self.width
        tables = (1 + self.own_head) * self.vocabulary * self.width
        return tables + self.matmul_parameters + self.layers * vectors + self.width

    def weight_bytes(self, element: int, *, one_byte: bool) -> int:
        """Bytes of all weights, of `element` bytes each.

        Args:
            one_byte: weights of the layers' matrices take one byte (int8, fp8), with an fp32 scale per row.
        """
        if not one_byte:
            return self.parameters * element
        scales = 4 * self.layers * sum(rows for rows, _ in self.linear_shapes)
        return (self.parameters - self.matmul_parameters) * element + self.matmul_parameters + scales


@dataclass(frozen=True)
class Adapters:
    """LoRA beside some of the linear layers (`trainer/nn/llm/lora.py`), in fp32.

    Raises:
        ValueError: a target is not one of the linear layers known here.
    """

    rank: int
    targets: tuple[str, ...]
    dropout: bool

    def __post_init__(self) -> None:
        if unknown := [name for name in self.targets if name not in _LINEAR]:
            raise ValueError(f"adapters of {unknown[0]} cannot be planned: choose from {', '.join(_LINEAR)}")

    def parameters(self, shape: LLMShape) -> int:
        """Number of parameters in all layers."""
        return shape.layers * sum(self.of_layer(shape, name) for name in self.targets)

    def of_layer(self, shape: LLMShape, name: str) -> int:
        """Number of parameters of the two small matrices beside one linear layer."""
        return self.rank * sum(shape.linear[name])
