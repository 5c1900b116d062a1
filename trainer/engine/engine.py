"""The training engine: one optimizer step over all ranks, through DeepSpeed.

The loss of a step is that of its global batch, at any number of ranks and micro-batches:

    ranks          every rank all-gathers the terms (one row per user) and computes the same loss; backward reaches
                   only the rank's own rows (see `World.all_gather_rows`).
    micro-batches  the loss couples users, so a first pass without gradient computes all terms, the loss is
                   differentiated with respect to them, and a second pass backpropagates those gradients through the
                   model one micro-batch at a time (GradCache, Gao et al. 2021). Exact, at the cost of one extra
                   forward pass.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.config.deepspeed_json import zero_stage
from trainer.device import Stopwatch, mark_step
from trainer.distributed import World
from trainer.engine.rank_status import AveragedGradNorm, LocalGradNorm, RankStatus, check_finite, exchange
from trainer.engine.sharding import check_equal, frozen_checksums, not_broadcast, shard
from trainer.models import load_weights
from trainer.models.interface import Losses, Recommender
from trainer.runs.batch_shares import share_sizes
from trainer.runs.folder import Checkpoint

BatchT = TypeVar("BatchT")
TermsT = TypeVar("TermsT", bound=NamedTuple)


@dataclass(frozen=True)
class StepReport:
    """Loss, gradient norm, per-rank status and timing of one optimizer step."""

    loss: float
    parts: dict[str, float]
    grad_norm: float
    ranks: tuple[RankStatus, ...]
    """Per-rank status."""
    forward_seconds: float
    """Seconds of this rank's forward pass, up to the first point where it may wait for other ranks."""


class Engine(Generic[BatchT, TermsT]):
    """A model wrapped by DeepSpeed, with Adam.

    Args:
        model: a `Recommender`; only its parameters that require a gradient are optimised.
        settings: DeepSpeed's configuration, from `load_deepspeed_json`.
        fixed_prefix: name prefix of the parameters that `step(keep_fixed=True)` leaves unchanged; empty: none.

    Raises:
        ConfigError: ranks have read different frozen weights.
    """

    def __init__(
        self,
        model: Recommender[BatchT, TermsT],
        train: TrainConfig,
        settings: dict[str, Any],
        world: World,
        *,
        fixed_prefix: str = "",
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.world = world
        self._model = model  # DeepSpeed's `module` is this object
        self.train_config = train
        self.micro_batches = int(settings["gradient_accumulation_steps"])
        self.zero_stage = zero_stage(settings)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._forward_time = Stopwatch()
        optimizer = torch.optim.Adam(
            self._groups(fixed_prefix), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay
        )
        settings = json.loads(json.dumps(settings))  # a deep copy: DeepSpeed keeps the dict it is given
        self._grad_norm = AveragedGradNorm(self.trained.values(), settings, world.device)
        checksums = shard(model, settings, world.device) if self.zero_stage == 3 else None
        with not_broadcast(model):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=settings,
                dist_init_required=False,  # `trainer.distributed.start` has joined the process group
            )
        check_equal(world, frozen_checksums(model) if checksums is None else checksums)
        self._local_grad_norm = LocalGradNorm(self.trained.values(), world.device)

    @property
    def model(self) -> Recommender[BatchT, TermsT]:
        """The unwrapped recommender."""
        return self._model

    def step(
        self,
        batches: Sequence[BatchT],
        *,
        total_rows: int,
        seed: int,
        lr: float,
        status: RankStatus,
        keep_fixed: bool = False,
    ) -> StepReport:
        """One optimizer step on this rank's micro-batches of a global batch of `total_rows` users.

        Args:
            seed: seed of the dropout masks; the same on every rank.
            status: this rank's status, exchanged with the other ranks.
            keep_fixed: leave the `fixed_prefix` parameters bitwise unchanged, by a learning rate of 0.

        Raises:
            NonFiniteError: on every rank alike, before any parameter has changed.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = 0.0 if keep_fixed and group["fixed"] else lr
        self.deepspeed.train()
        self.world.heartbeat.at("forward")
        self._local_grad_norm.reset()
        self._forward_time.start()
        sizes = share_sizes(total_rows, self.world.size)
        if self.micro_batches == 1:
            terms, losses = self._global_loss(self._forward(batches[0], seed), sizes)
            self.deepspeed.backward(losses.total)
        else:
            terms, losses = self._backward_in_parts(batches, sizes, seed)
        mark_step()
        # Before `deepspeed.step`, so that a bad step fails on all ranks while parameters are still intact. Everything
        # that is reported is read here, so that the host waits once and then enqueues the optimizer step.
        also = [*losses.parts.values(), *self._grad_norm.scalars(self.deepspeed.optimizer)]
        step_R = exchange(self.world, losses.total, self._local_grad_norm.value(), status, also)
        own = step_R[self.world.rank]
        parts = dict(zip(losses.parts, own.also, strict=False))
        check_finite(step_R, parts, terms, sizes)
        self.world.heartbeat.at("optimizer")
        with self.world.heartbeat.collective():
            self.deepspeed.step()
            mark_step()
            grad_norm = self._grad_norm.value([step.also[len(parts) :] for step in step_R], self.deepspeed)
        return StepReport(
            loss=own.loss,
            parts=parts,
            grad_norm=grad_norm,
            ranks=tuple(step.status for step in step_R),
            forward_seconds=self._forward_time.seconds(),
        )

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's weights into the model for evaluation; training cannot continue from them."""
        import deepspeed

        parameters = list(self.trained.values()) if self.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.zero_stage == 3):
            load_weights(self.model, checkpoint)

    def _groups(self, fixed_prefix: str) -> list[dict[str, Any]]:
        """One parameter group, and a second one for the `fixed_prefix` parameters, whose learning rate can be 0."""
        is_fixed = {name: bool(fixed_prefix) and name.startswith(fixed_prefix) for name in self.trained}
        return [
            {"params": [self.trained[name] for name in is_fixed if is_fixed[name] == fixed], "fixed": fixed}
            for fixed in sorted(set(is_fixed.values()))
        ]

    def _forward(self, batch: BatchT, seed: int) -> TermsT:
        torch.manual_seed(seed)  # both passes over a micro-batch must draw the same dropout masks
        terms: TermsT = self.deepspeed(batch)
        if self.micro_batches > 1:  # on a lazy device, one graph per micro-batch rather than one for all
            mark_step()
        return terms

    def _global_loss(self, terms: TermsT, sizes: Sequence[int]) -> tuple[TermsT, Losses]:
        """The terms of all ranks, and their loss."""
        self._forward_time.stop()
        # The loss too: an accelerator only enqueues the gathers, so that a loss that read a value would wait there.
        with self.world.heartbeat.collective():
            gathered = terms._make(
                self.world.all_gather_rows(term, sizes) if isinstance(term, Tensor) else term for term in terms
            )
            losses = self.model.loss(gathered)
        self.world.heartbeat.at("backward")
        return gathered, losses

    def _backward_in_parts(self, batches: Sequence[BatchT], sizes: Sequence[int], seed: int) -> tuple[TermsT, Losses]:
        with torch.no_grad():
            parts = [self._forward(batch, seed) for batch in batches]
        terms = [
            torch.cat(columns) if isinstance(columns[0], Tensor) else columns[0] for columns in zip(*parts, strict=True)
        ]
        floating = [term.requires_grad_() for term in terms if _is_floating(term)]
        gathered, losses = self._global_loss(parts[0]._make(terms), sizes)
        # Some terms, such as counts and indices, carry no gradient.
        found = iter(torch.autograd.grad(losses.total, floating, allow_unused=True))
        gradients = [next(found) if _is_floating(term) else None for term in terms]
        start = 0
        for batch, part in zip(batches, parts, strict=True):
            rows = slice(start, start + len(part[0]))
            start = rows.stop
            fresh = self._forward(batch, seed)
            surrogate = _inner_product(fresh, gradients, rows)  # its gradient is this micro-batch's part of the loss's
            # DeepSpeed divides by the number of micro-batches, but these gradients must be summed.
            self.deepspeed.backward(surrogate * self.micro_batches)
            if batch is not batches[-1]:
                self.deepspeed.step()  # counts the micro-batch; parameters move only after the last one
        return gathered, losses


def _is_floating(term: Tensor | int) -> bool:
    return isinstance(term, Tensor) and term.is_floating_point()


def _inner_product(terms: Iterable[Tensor | int], gradients: Sequence[Tensor | None], rows: slice) -> Tensor:
    products = [
        (term * gradient[rows]).sum()
        for term, gradient in zip(terms, gradients, strict=True)
        if gradient is not None and isinstance(term, Tensor) and term.requires_grad
    ]
    return torch.stack(products).sum()
