"""What the planner of systems by id counts."""

from __future__ import annotations

import torch
from torch import nn

from trainer.planner.id_plan import measure


def test_a_step_is_counted_in_products_and_saved_bytes() -> None:
    layer, x = nn.Linear(30, 20, bias=False), torch.randn(7, 30)
    work = measure(lambda: layer(x).tanh().sum().backward(), set(layer.parameters()))
    # Forward, and the gradient of the weight; the input needs none.
    assert work.flops == 2 * (2 * 7 * 30 * 20)
    # The input, for the weight's gradient, and the output of tanh; the weight exists anyway.
    assert work.saved == 4 * (7 * 30 + 7 * 20)
    assert 4 <= work.operations <= 12
    assert work.times(3).flops == 3 * work.flops
    assert work.times(3).operations == work.operations
