"""What ranks exchange in a training step, by the collectives that carry it.

Held against counted bytes and calls of real runs by `tests/distributed/test_traffic.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from trainer.config import LLMSRecConfig
from trainer.planner.llm_shape import Adapters, LLMShape

_VITALS = 5
"""Numbers that each rank says of itself (`trainer/engine/rank_status.py`)."""
_LAYER_MODULES = 9
"""Of one layer, that have weights: seven matrices and two norms. ZeRO-3 gathers each by itself if it has no bucket to
fetch ahead into."""
_TRAINED_MODULES, _TEACHER_MODULES = 14, 20
"""Of LLM-SRec, and of a forward pass through a SASRec of two blocks."""


@dataclass(frozen=True)
class Parts:
    """Bytes of what every rank has whole without ZeRO-3."""

    trained: int
    """Trained parameters, and as much their gradients: fp32."""
    layers: int
    """Of the LLM, frozen, with its last norm."""
    recomputed: int
    """Of these, what runs once more when activations are recomputed: nobody saves what `down_proj` gives."""
    tokens: int
    """Its token table."""
    num_layers: int
    besides: int = 0
    """Read once in a forward pass: the teacher."""

    @classmethod
    def of(
        cls, shape: LLMShape, element: int, trained: int, adapters: Adapters | None = None, *, besides: int = 0
    ) -> Self:
        """The sizes of an LLM whose weights have `element` bytes, beside so many trained parameters."""
        tokens, norm = (element * rows * shape.width for rows in (shape.vocabulary, 1))
        layers = shape.weight_bytes(element, one_byte=False) - tokens
        rows, columns = shape.linear["down_proj"]
        saved = adapters is not None and "down_proj" in adapters.targets
        recomputed = layers - norm - (0 if saved else element * shape.layers * rows * columns)
        return cls(4 * trained, layers, recomputed, tokens, shape.layers, besides)


@dataclass(frozen=True)
class Rings:
    """Collectives of one kind in a step."""

    whole: int = 0
    """Bytes of their whole tensors."""
    calls: int = 0


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step."""

    reduced: Rings
    """All-reduces, which go around the ring twice."""
    gathered: Rings
    """All-gathers of trained parts, for the first time since they changed."""
    scattered: Rings = Rings()
    """Reduce-scatters."""
    repeated: Rings = Rings()
    """All-gathers of what never changes, and of trained parts once more: within nodes, where these keep a copy
    (`zero_hpz_partition_size`)."""

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, by rings."""
        once = self.gathered.whole + self.scattered.whole + self.repeated.whole
        return (2 * self.reduced.whole + once) * (ranks - 1) / ranks


def step_traffic(
    parts: Parts, *, zero_stage: int, micro_batches: int, streams: int = 2, recompute: bool = False
) -> Traffic:
    """Gradients, updated weights and, under ZeRO-3, all weights, as of a model far larger than what DeepSpeed keeps.

    The norm of the gradient is among the calls; its one or two numbers are not among the bytes.

    Args:
        streams: how often a forward pass runs the layers: 2 where tokens without gradient run first, else 1.
    """
    if zero_stage < 3:
        reductions = micro_batches if zero_stage == 2 else 1
        updated = Rings(parts.trained, 1) if zero_stage else Rings()
        return Traffic(Rings(reductions * parts.trained, reductions + (zero_stage > 0)), updated)
    # Of several micro-batches, each runs once more to give the terms of the whole batch.
    forwards, backwards = 1 if micro_batches == 1 else 2 * micro_batches, micro_batches
    runs = streams * forwards
    weights = (runs + backwards) * parts.layers + runs * parts.tokens + forwards * parts.besides
    # Besides the layers each run gathers token table and last norm, each backward pass the last norm.
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


def term_rings(system: LLMSRecConfig, users: int, ranks: int) -> Rings:
    """All-gathers of what LLM-SRec's loss needs of each user of the global batch, and of the ranks' vitals.

    Of a user: that there is a target, the scores of its candidates, two projections (fp32).
    """
    numbers = 1 + system.train_candidates + 2 * system.projected_dim
    return Rings(4 * (users * numbers + ranks * _VITALS), 5)
