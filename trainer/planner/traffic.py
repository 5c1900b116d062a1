"""Bytes and calls of the collectives in a training step.

`tests/distributed/test_traffic.py` compares them with those counted in real runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from trainer.config import LLMSRecConfig
from trainer.planner.llm_shape import Adapters, LLMShape

_STATUS_NUMBERS = 9
"""Numbers that ranks exchange after the backward pass (`trainer/engine/rank_status.py`): their status, three parts of
LLM-SRec's loss, and the norm of their part of the gradient, which ZeRO-3 leaves out."""
_LAYER_MODULES = 9
"""Modules with weights in one layer: seven matrices and two norms. ZeRO-3 gathers each on its own if it has no bucket
to prefetch into."""
_TRAINED_MODULES, _TEACHER_MODULES = 14, 20
"""Modules with weights that LLM-SRec trains, and in a forward pass through a SASRec of two blocks."""


@dataclass(frozen=True)
class Parts:
    """Bytes of the parameters that every rank holds in full without ZeRO-3."""

    trained: int
    """Bytes of the trained parameters, and also of their gradients: fp32."""
    layers: int
    """Bytes of the LLM's layers, frozen, with its last norm."""
    recomputed: int
    """The part of `layers` that runs again when activations are recomputed: the output of `down_proj` is not saved."""
    tokens: int
    """Bytes of the LLM's token table."""
    num_layers: int
    teacher: int = 0
    """Bytes of the teacher, read once per forward pass."""

    @classmethod
    def of(
        cls, shape: LLMShape, element: int, trained: int, adapters: Adapters | None = None, *, teacher: int = 0
    ) -> Self:
        """Sizes for an LLM whose weights take `element` bytes, and this many trained parameters."""
        tokens, norm = (element * rows * shape.width for rows in (shape.vocabulary, 1))
        layers = shape.weight_bytes(element, one_byte=False) - tokens
        rows, columns = shape.linear["down_proj"]
        saved = adapters is not None and "down_proj" in adapters.targets
        recomputed = layers - norm - (0 if saved else element * shape.layers * rows * columns)
        return cls(4 * trained, layers, recomputed, tokens, shape.layers, teacher)


@dataclass(frozen=True)
class Rings:
    """Collectives of one kind in a step."""

    whole: int = 0
    """Bytes of their full tensors."""
    calls: int = 0
    """Number of collectives."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step."""

    reduced: Rings
    """All-reduces, which go around the ring twice."""
    gathered: Rings
    """First all-gathers of trained parameters after they changed."""
    scattered: Rings = Rings()
    """Reduce-scatters."""
    repeated: Rings = Rings()
    """All-gathers of frozen parameters, and repeated ones of trained parameters; they stay within a node if nodes keep
    a copy (`zero_hpz_partition_size`)."""

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends with ring collectives."""
        once = self.gathered.whole + self.scattered.whole + self.repeated.whole
        return (2 * self.reduced.whole + once) * (ranks - 1) / ranks


def step_traffic(
    parts: Parts, *, zero_stage: int, micro_batches: int, streams: int = 2, recompute: bool = False
) -> Traffic:
    """Traffic of gradients, updated weights and, under ZeRO-3, all weights.

    For a model far larger than what DeepSpeed keeps gathered. Under ZeRO-3 the gradient norm is among the calls; its
    one or two numbers are not among the bytes.

    Args:
        streams: how often a forward pass runs the layers: 2 if a frozen stream runs first, else 1.
    """
    if zero_stage < 3:
        reductions = micro_batches if zero_stage == 2 else 1
        updated = Rings(parts.trained, 1) if zero_stage else Rings()
        return Traffic(Rings(reductions * parts.trained, reductions), updated)
    # With several micro-batches, each runs twice: first for the terms of the global batch (GradCache).
    forwards, backwards = 1 if micro_batches == 1 else 2 * micro_batches, micro_batches
    runs = streams * forwards
    weights = (runs + backwards) * parts.layers + runs * parts.tokens + forwards * parts.teacher
    # Besides the layers, each run gathers the token table and the last norm, each backward pass the last norm.
    calls = (runs + backwards) * parts.num_layers * _LAYER_MODULES + 2 * runs + backwards + forwards * _TEACHER_MODULES
    if recompute:
        weights += backwards * parts.recomputed
        calls += backwards * parts.num_layers * (_LAYER_MODULES - 1)
    more = forwards + backwards - 1
    return Traffic(
        reduced=Rings(0, 1),
        gathered=Rings(parts.trained, _TRAINED_MODULES),
        scattered=Rings(backwards * parts.trained, backwards),
        repeated=Rings(weights + more * parts.trained, calls + more * _TRAINED_MODULES),
    )


def term_rings(system: LLMSRecConfig, users: int, ranks: int, items: int = 0) -> Rings:
    """All-gathers of the terms of LLM-SRec's loss, for all users of the global batch, and of the ranks' status.

    Per user with one target: whether there is one, the scores of the candidates, and two projections (fp32).

    Args:
        items: distinct items of the global batch, for `train_candidates=batch`; then a user has, instead of scores, the
            index of the target, some items with a probability each, and a mark for every item. Vectors for
            `score_distill_weight` are not counted.
    """
    numbers, calls = 1 + 2 * system.projected_dim, 4
    if system.train_candidates == "batch":
        per_user = -(-items // users)
        gathered = users * (4 * (numbers + per_user * (system.projected_dim + 1)) + 8 + items)
        calls += 6  # two of them empty unless the teacher's scores are distilled
    else:
        gathered = users * 4 * (numbers + system.train_candidates)
        calls += 1
    return Rings(gathered + 4 * ranks * _STATUS_NUMBERS, calls)
