"""A loss or gradient that is not finite: which ranks are named."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.engine.rank_status import NonFiniteError, RankStatus, StepStatus, check_finite


@pytest.mark.parametrize(
    ("rows", "named"),
    [([3], " on rank 1"), ([0, 4], " on ranks 0, 2"), ([0, 3, 4], ""), ([], "")],
    ids=["one rank", "two ranks", "all ranks", "a loss of finite terms"],
)
def test_the_ranks_whose_terms_are_not_finite_are_named(rows: list[int], named: str) -> None:
    """Shares of two, two and one user. If all ranks' are, as with a too high learning rate, none stands out."""
    loss_B, user_BD = torch.ones(5), torch.ones(5, 4)
    user_BD[rows, 2] = math.inf
    loss = [StepStatus(math.nan, 1.0, RankStatus())] * 3
    with pytest.raises(NonFiniteError) as raised:
        check_finite(loss, {"bce": math.nan}, [loss_B, user_BD], [2, 2, 1])
    assert str(raised.value) == f"the loss{named} is nan (bce=nan)"


@pytest.mark.parametrize(
    ("losses", "norms", "said"),
    [
        ([1.0, 1.0], [1.0, math.inf], "the gradient norm on rank 1 is inf"),
        ([1.0, 1.0], [math.nan, math.nan], "the gradient norm is nan"),
        ([math.nan, 1.0], [1.0, 1.0], "the loss on rank 0 is nan ()"),
    ],
    ids=["gradient", "gradient on all ranks", "a different loss of the same terms"],
)
def test_the_rank_of_a_gradient_or_of_a_different_loss_is_named(
    losses: list[float], norms: list[float], said: str
) -> None:
    steps = [StepStatus(loss, norm, RankStatus()) for loss, norm in zip(losses, norms, strict=True)]
    with pytest.raises(NonFiniteError) as raised:
        check_finite(steps, {}, [torch.ones(2)], [1, 1])
    assert str(raised.value) == said
