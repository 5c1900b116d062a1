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
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
"""Families of mixtures of experts whose weights are counted."""
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Experts:
    """The feed-forward part of a mixture of experts: a router chooses `used` of `count` experts for each token."""

    count: int
    used: int
    width: int
    """Intermediate width of each."""
    shared: int = 0
    """Intermediate width of an expert that every token runs through, with a gate of its own; 0: there is none."""

    @property
    def active(self) -> int:
        """Intermediate width that one token runs through."""
        return self.used * self.width + self.shared


@dataclass(frozen=True)
class LLMShape:
    """A decoder of the Llama kind: grouped-query attention, gated feed-forward, two RMS norms per layer."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Intermediate width of the feed-forward part that one token runs through."""
    vocabulary: int
    attention_bias: bool = False
    """Whether queries, keys and values have a bias."""
    output_bias: bool = False
    """Whether the output projection of attention has a bias."""
    fused: bool = True
    """Whether norms and gated products are fused, as in `trainer/nn/llm/fused.py`."""
    own_head: bool = False
    """Whether an LM head that is not tied to the token table is loaded too."""
    experts: Experts | None = None
    """None: every token runs through the same feed-forward part."""
    head_norm: int = 0
    """Weights of the norms of queries and keys, per layer."""

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
        experts = _experts(settings, family, source)
        if settings.get("kv_lora_rank"):
            raise ValueError(f"{source} has kv_lora_rank (latent attention), which cannot be planned")
        head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
        kv_heads = settings.get("num_key_value_heads") or heads
        normed = {"qwen3": 2 * head_dim, "qwen3_moe": 2 * head_dim, "olmoe": (heads + kv_heads) * head_dim}
        shape = cls(
            width=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=experts.active if experts else settings["intermediate_size"],
            vocabulary=settings["vocab_size"],
            # Qwen2 has these biases, but no key for them.
            attention_bias=bias or family in ("qwen2", "qwen2_moe"),
            output_bias=bias,
            fused=settings.get("hidden_act", "silu") == "silu",
            experts=experts,
            head_norm=normed.get(family, 0),
            own_head=with_head and not tied,
        )
        return replace(shape, layers=min(layers, shape.layers) if layers else shape.layers)

    @property
    def linear(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) shapes of the weight matrices that a token is multiplied with in one layer, by name."""
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
    def idle_parameters(self) -> int:
        """Weights of a layer's experts that a token does not run through, and of what chooses among them."""
        if self.experts is None:
            return 0
        idle = (self.experts.count - self.experts.used) * 3 * self.experts.width
        return self.width * (idle + self.experts.count + bool(self.experts.shared))

    @property
    def layer_parameters(self) -> int:
        """Weights in the matrices of one layer, all experts included."""
        return self.matmul_parameters // self.layers + self.idle_parameters

    @property
    def parameters(self) -> int:
        """All weights that are loaded: token table, layers with all experts, norms, and an untied LM head if tokens are
        predicted."""
        attended, cached = self.heads * self.head_dim, self.kv_heads * self.head_dim
        vectors = 2 * self.width + self.attention_bias * (attended + 2 * cached) + self.output_bias * self.width
        tables = (1 + self.own_head) * self.vocabulary * self.width
        layers = self.layers * (self.layer_parameters + vectors + self.head_norm)
        return tables + layers + self.width

    def weight_bytes(self, element: int, *, one_byte: bool) -> int:
        """Bytes of all weights, of `element` bytes each.

        Args:
            one_byte: weights of the layers' matrices take one byte (int8, fp8), with an fp32 scale per row.
        """
        if not one_byte:
            return self.parameters * element
        scales = 4 * self.layers * sum(rows for rows, _ in self.linear_shapes)
        return (self.parameters - self.matmul_parameters) * element + self.matmul_parameters + scales


def _experts(settings: Mapping[str, Any], family: str, source: str) -> Experts | None:
    """The experts that a config.json describes; None without any.

    Raises:
        ValueError: a mixture whose weights are not counted.
    """
    count = next((settings[key] for key in _EXPERT_KEYS if settings.get(key) not in (None, 0, 1)), None)
    if count is None and family not in _MIXTURES:
        return None
    if family not in _MIXTURES:
        raise ValueError(
            f"{source} is of a mixture of experts ('{family}'), of which only {', '.join(_MIXTURES)} can be planned"
        )
    if settings.get("mlp_only_layers") or settings.get("decoder_sparse_step", 1) != 1:
        raise ValueError(f"{source} has layers without experts among those that have some, which cannot be planned")
    width_key = "intermediate_size" if family in ("mixtral", "olmoe") else "moe_intermediate_size"
    used, width = settings.get("num_experts_per_tok"), settings.get(width_key)
    shared = settings.get("shared_expert_intermediate_size", 0) if family == "qwen2_moe" else 0
    if not all(isinstance(number, int) and 1 <= number < 2**31 for number in (count, used, width)) or not isinstance(
        shared, int
    ):
        raise ValueError(f"{source} lacks the number of experts, num_experts_per_tok or {width_key}: copy it again")
    assert isinstance(count, int)
    assert isinstance(used, int)
    assert isinstance(width, int)
    return Experts(count, used, width, shared)


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
