"""Bytes and calls of the collectives in a training step.

`tests/distributed/test_traffic.py` compares them with those counted in real runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from trainer.config import LLM4RecConfig, LLMSRecConfig
from trainer.planner.llm_shape import Adapters, LLMShape

_STATUS_NUMBERS = 9
"""Numbers that ranks exchange after the backward pass (`trainer/engine/rank_status.py`): their status, three parts of
LLM-SRec's loss, and the norm of their part of the gradient, which ZeRO-3 leaves out."""
_LAYER_MODULES = 9
"""Modules with weights in one layer: seven matrices and two norms. ZeRO-3 gathers each on its own if it has no bucket
to prefetch into."""
_TRAINED_MODULES, _TEACHER_MODULES = 14, 20
"""Modules with weights that LLM-SRec trains, and in a forward pass through a SASRec of two blocks."""
_PROJECTOR_MODULES = 3
"""Modules with weights of f_U."""


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
    """Bytes of the teacher that a forward pass reads; its item table counts as often as it is read: for the slots, and
    with `system.score_distill_weight` for the scores of the batch's items."""
    trained_modules: int = _TRAINED_MODULES
    """Modules with trained weights."""
    teacher_modules: int = _TEACHER_MODULES
    """Modules of the teacher that a forward pass reads."""

    @classmethod
    def of(
        cls,
        shape: LLMShape,
        element: int,
        trained: int,
        adapters: Adapters | None = None,
        *,
        teacher: int = 0,
        system: LLM4RecConfig | None = None,
    ) -> Self:
        """Sizes for an LLM whose weights take `element` bytes, and this many trained parameters.

        Args:
            system: counts the modules of LLM-SRec's options; None: as without them.
        """
        tokens, norm = (element * rows * shape.width for rows in (shape.vocabulary, 1))
        layers = shape.weight_bytes(element, one_byte=False) - tokens
        rows, columns = shape.linear["down_proj"]
        saved = adapters is not None and "down_proj" in adapters.targets
        recomputed = layers - norm - (0 if saved else element * shape.layers * rows * columns)
        srec = system if isinstance(system, LLMSRecConfig) else None
        return cls(
            4 * trained,
            layers,
            recomputed,
            tokens,
            shape.layers,
            teacher,
            _TRAINED_MODULES + (_PROJECTOR_MODULES if srec and srec.user_vector else 0),
            _TEACHER_MODULES + (srec is not None and srec.score_distill_weight > 0),
        )


@dataclass(frozen=True)
class Rings:
    """Collectives of one kind in a step."""

    whole: int = 0
    """Bytes of their full tensors."""
    calls: int = 0
    """Number of collectives."""


NO_RINGS = Rings()


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step."""

    reduced: Rings
    """All-reduces, which go around the ring twice."""
    gathered: Rings
    """First all-gathers of trained parameters after they changed."""
    scattered: Rings = NO_RINGS
    """Reduce-scatters."""
    repeated: Rings = NO_RINGS
    """All-gathers of frozen parameters, and repeated ones of trained parameters; they stay within a node if nodes keep
    a copy (`zero_hpz_partition_size`)."""
    terms: Rings = NO_RINGS
    """All-gathers of the terms of the loss; see `term_rings`."""

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends with ring collectives."""
        once = self.gathered.whole + self.scattered.whole + self.repeated.whole + self.terms.whole
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
    calls = (runs + backwards) * parts.num_layers * _LAYER_MODULES + 2 * runs + backwards
    calls += forwards * parts.teacher_modules
    if recompute:
        weights += backwards * parts.recomputed
        calls += backwards * parts.num_layers * (_LAYER_MODULES - 1)
    more = forwards + backwards - 1
    return Traffic(
        reduced=Rings(0, 1),
        gathered=Rings(parts.trained, parts.trained_modules),
        scattered=Rings(backwards * parts.trained, backwards),
        repeated=Rings(weights + more * parts.trained, calls + more * parts.trained_modules),
    )


def term_rings(
    system: LLM4RecConfig, users: int, ranks: int, *, targets: int = 1, items: int = 0, teacher_dim: int = 0
) -> Rings:
    """All-gathers of the terms of a retrieval loss, for all users of the global batch, and of the ranks' status.

    Per target: whether it is one, and the scores of its candidates (fp32); with distillation also the projected user
    vectors of student and teacher. The fields of `trainer/models/llm/retrieval.py`'s terms, one call each.

    Args:
        targets: targets per user, padding included.
        items: distinct items of the global batch, for `train_candidates=batch`. A target then has, instead of scores,
            the user vector and the index of its item; and a user some items, each with a vector and a probability, and
            a mark for every item.
        teacher_dim: width of the teacher's own vectors of users and items, which `score_distill_weight` gathers, too.
    """
    distilled = isinstance(system, LLMSRecConfig)
    if system.train_candidates == "batch":
        own = teacher_dim if isinstance(system, LLMSRecConfig) and system.score_distill_weight else 0
        per_user, per_target = -(-items // users), 4 * (1 + (1 + distilled) * system.projected_dim + own) + 8
        gathered = users * (targets * per_target + 4 * per_user * (system.projected_dim + 1 + own) + items)
        calls = 9  # the teacher's vectors are gathered, empty, even where they have no use
    else:
        gathered = 4 * users * targets * (1 + system.train_candidates + 2 * distilled * system.projected_dim)
        calls = 2 + 2 * distilled
    return Rings(gathered + 4 * ranks * _STATUS_NUMBERS, calls + 1)
