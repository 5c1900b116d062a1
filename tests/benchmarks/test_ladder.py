"""Every rung of the ladder computes the same step, and costs no more than the rung above."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llm_srec_config

from benchmarks.common.machine import executed_flops
from benchmarks.ladder import published, rungs, step_of
from benchmarks.training import Way
from trainer.config import RunConfig, parse_config
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order


def test_rungs_give_one_loss_and_gradient_at_falling_cost(world: Path, teacher: Path, tiny_llm: Path) -> None:
    def config(recompute: bool) -> RunConfig:
        tree: dict[str, Any] = llm_srec_config(world, Path("unused"), teacher, tiny_llm)
        tree["system"]["llm"] |= {"max_tokens": 1024, "recompute": recompute}
        return parse_config(tree, "test")

    dataset = open_dataset(world, full_check=False)
    users = next(read_in_order(world, dataset.manifest)).take(slice(0, 10))
    ways: list[Way] = [published("published", config(True), dataset, head=head) for head in (True, False)]
    ways += [step_of(rung, config(rung.recompute), dataset) for rung in rungs()]
    flops, losses, norms = [], [], []
    for way in ways:
        model = way.model
        model.zero_grad()
        total = model.loss(way.terms(users)).total
        torch.autograd.backward(total)
        losses.append(float(total.detach()))
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        flops.append(executed_flops(partial(way.step, users)))
    assert losses == pytest.approx([losses[0]] * len(ways), rel=1e-5)
    assert norms == pytest.approx([norms[0]] * len(ways), rel=1e-4)
    *plain, whole = flops
    assert flops == sorted(flops, reverse=True)
    assert len(set(plain)) == len(plain), "each rung except the last (no matrix products) reduces the cost"
    assert whole == plain[-1]
