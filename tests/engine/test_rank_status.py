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
        check_finite(loss, {"bce": torch.tensor(math.nan)}, [loss_B, user_BD], [2, 2, 1])
    assert str(raised.value) == f"the loss is nan{named} (bce=nan)"


def test_the_rank_of_a_gradient_is_named() -> None:
    steps = [StepStatus(1.0, norm, RankStatus()) for norm in (1.0, math.inf)]
    with pytest.raises(NonFiniteError, match="the gradient norm on rank 1 is inf"):
        check_finite(steps, {}, [], [1, 1])
