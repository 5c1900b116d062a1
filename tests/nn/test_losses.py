"""The losses against values computed by hand from the papers' equations.

Letters: B users, C candidates, D dimensions, K negatives, M positions, N items.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.nn import losses


def random_scores(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- binary cross-entropy and gBCE ---


def test_binary_cross_entropy_by_hand() -> None:
    # σ(ln 3) = 3/4, so -ln 3/4 for the positive; s⁻ = -ln 3: 1 - 1/4 = 3/4; s⁻ = 0: 1/2.
    # -ln(3/4) - ln(3/4) - ln(1/2) = ln(4/3 · 4/3 · 2) = ln(32/9)
    loss_M = losses.binary_cross_entropy(torch.tensor([math.log(3)]), torch.tensor([[-math.log(3), 0.0]]))
    assert loss_M.shape == (1,)
    assert loss_M.item() == pytest.approx(math.log(32 / 9), rel=1e-6)


def test_binary_cross_entropy_is_sasrec_at_one_negative() -> None:
    positive_M, negative_M = random_scores(0, 7), random_scores(1, 7)
    criterion = torch.nn.BCEWithLogitsLoss()
    sasrec = criterion(positive_M, torch.ones(7).double()) + criterion(negative_M, torch.zeros(7).double())
    ours = losses.binary_cross_entropy(positive_M, negative_M.unsqueeze(1)).mean()
    torch.testing.assert_close(ours, sasrec)


def test_binary_cross_entropy_is_finite_and_right_at_extreme_scores() -> None:
    # -log σ(-200) = 200 + log(1 + e^-200) = 200, and so is -log(1 - σ(200)); the right side of both costs 0.
    loss_M = losses.binary_cross_entropy(
        torch.tensor([-200.0, 200.0]), torch.tensor([[200.0, 200.0], [-200.0, -200.0]])
    )
    assert loss_M.tolist() == [600.0, 0.0]


def literal_gbce(positive_M: Tensor, negative_MK: Tensor, num_items: int, t: float) -> Tensor:
    """gSASRec as published: transform the positive logit, then BCE, in float64."""
    alpha = negative_MK.shape[1] / (num_items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    transformed_M = torch.log(1 / (torch.sigmoid(positive_M) ** -beta - 1))
    logit = torch.cat((transformed_M.unsqueeze(1), negative_MK), dim=1)
    label = torch.zeros_like(logit)
    label[:, 0] = 1
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, label, reduction="none").sum(dim=1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("num_negatives", [1, 5, 50])
def test_gbce_equals_the_published_transform(t: float, num_negatives: int) -> None:
    positive_M, negative_MK = random_scores(2, 11) * 3, random_scores(3, 11, num_negatives) * 3
    expected_M = literal_gbce(positive_M, negative_MK, num_items=51, t=t)
    torch.testing.assert_close(losses.gbce(positive_M, negative_MK, 51, t), expected_M, rtol=1e-9, atol=1e-9)


def test_gbce_by_hand() -> None:
    # K = 2, 9 items: α = 2/8 = 1/4; t = 1/2: β = 1/4 · (1/2 · (1 - 4) + 4) = 1/4 · 5/2 = 5/8.
    # s⁺ = 0: -5/8 · ln(1/2); two negatives at 0: 2 ln 2. Together (5/8 + 2) ln 2.
    loss_M = losses.gbce(torch.zeros(1), torch.zeros(1, 2), num_items=9, t=0.5)
    assert loss_M.item() == pytest.approx(2.625 * math.log(2), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), num_negatives=st.integers(1, 40), extra=st.integers(1, 1000))
def test_gbce_at_t_0_is_binary_cross_entropy_to_the_bit(seed: int, num_negatives: int, extra: int) -> None:
    positive_M = random_scores(seed, 6, dtype=torch.float32) * 20
    negative_MK = random_scores(seed + 1, 6, num_negatives, dtype=torch.float32) * 20
    gbce_M = losses.gbce(positive_M, negative_MK, num_items=num_negatives + extra, t=0.0)
    assert torch.equal(gbce_M, losses.binary_cross_entropy(positive_M, negative_MK))


def test_gbce_is_finite_where_the_published_transform_overflows() -> None:
    positive_M = torch.tensor([-200.0, 100.0], requires_grad=True)
    # α = 1/10; t = 1: β = α. s⁺ = -200: 200 β = 20. Negatives at -200 cost nothing.
    loss_M = losses.gbce(positive_M, torch.full((2, 1), -200.0), num_items=11, t=1.0)
    loss_M.sum().backward()
    torch.testing.assert_close(loss_M.detach(), torch.tensor([20.0, 0.0]))
    # dL/ds⁺ = -β (1 - σ(s⁺))
    torch.testing.assert_close(positive_M.grad, torch.tensor([-0.1, 0.0]))


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_gbce_refuses_t_outside_0_1(t: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        losses.gbce(torch.zeros(1), torch.zeros(1, 1), num_items=10, t=t)


def test_gbce_refuses_more_negatives_than_items_and_says_how_many_fit() -> None:
    losses.gbce(torch.zeros(1), torch.zeros(1, 9), num_items=10, t=0.5)
    with pytest.raises(ValueError, match="between 1 and 9 negatives"):
        losses.gbce(torch.zeros(1), torch.zeros(1, 10), num_items=10, t=0.5)


def test_a_positive_with_an_extra_axis_does_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        losses.binary_cross_entropy(torch.zeros(3, 1), torch.zeros(3, 2))
    with pytest.raises(AssertionError):
        losses.sampled_softmax(torch.zeros(3), torch.zeros(2, 2))


# --- softmax ---


def test_retrieval_by_hand() -> None:
    # e^ln2 / (e^ln2 + e^0 + e^ln5) = 2 / 8, so ln 4; equal scores of four candidates: ln 4 as well.
    score_BC = torch.tensor([[math.log(2), 0.0, math.log(5), -math.inf], [7.0, 7.0, 7.0, 7.0]])
    assert losses.retrieval(score_BC).tolist() == pytest.approx([math.log(4)] * 2, rel=1e-6)


def test_batch_softmax_by_hand() -> None:
    score_YM = torch.tensor([[1.0, 2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])
    excluded_YM = torch.tensor([[False, False, False, True], [False, False, False, False]])
    target_Y = torch.tensor([0, 3])
    first = -math.log(math.exp(1) / (math.exp(1) + math.exp(2) + math.exp(3)))
    second = -math.log(math.exp(2) / (math.exp(0) + math.exp(1) + math.exp(-1) + math.exp(2)))
    assert losses.batch_softmax(score_YM, target_Y, excluded_YM).tolist() == pytest.approx([first, second])
    chance_M = torch.tensor([0.5, 0.25, 1.0, 0.1])
    corrected = losses.batch_softmax(score_YM, target_Y, excluded_YM, chance_M.log())
    weight = [math.exp(score) / chance for score, chance in zip((1, 2, 3), (0.5, 0.25, 1.0), strict=True)]
    assert float(corrected[0]) == pytest.approx(-math.log(weight[0] / sum(weight)))


def test_score_distillation_by_hand() -> None:
    student_YM, teacher_YM = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.5, -0.5, 9.0]], requires_grad=True)
    student_YM.requires_grad_()
    excluded_YM = torch.tensor([[False, False, True]])
    p = math.exp(0.5) / (math.exp(0.5) + math.exp(-0.5))
    q = math.exp(1) / (math.exp(1) + math.exp(2))
    found = losses.score_distillation(student_YM, teacher_YM.detach(), excluded_YM)
    assert float(found) == pytest.approx(-(p * math.log(q) + (1 - p) * math.log(1 - q)))
    [gradient] = torch.autograd.grad(found.sum(), student_YM)
    assert gradient[0].tolist() == pytest.approx([q - p, p - q, 0.0], abs=1e-6)


def test_log_q_makes_the_items_of_a_batch_estimate_the_whole_catalog() -> None:
    """The denominator, averaged over batches, is that over all items; without the correction it is far smaller."""
    generator = torch.Generator().manual_seed(0)
    score_N, chance_N = torch.randn(50, generator=generator), torch.rand(50, generator=generator) * 0.8 + 0.1
    chance_N[0] = 1.0  # the target, which is in every batch
    sums: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(4000):
        in_N = torch.rand(50, generator=generator) < chance_N
        nothing_YM = torch.zeros(1, int(in_N.sum()), dtype=torch.bool)
        for corrected, found in sums.items():
            log_q_M = chance_N[in_N].log() if corrected else None
            loss_Y = losses.batch_softmax(score_N[in_N][None], torch.tensor([0]), nothing_YM, log_q_M)
            found.append(float((loss_Y[0] + score_N[0]).exp()))
    whole = float(score_N.exp().sum())
    assert sum(sums[True]) / 4000 == pytest.approx(whole, rel=0.02)
    assert sum(sums[False]) / 4000 < 0.8 * whole


def test_sampled_softmax_by_hand() -> None:
    # 3 / (3 + 1 + 2) = 1/2
    loss_M = losses.sampled_softmax(torch.tensor([math.log(3)]), torch.tensor([[0.0, math.log(2)]]))
    assert loss_M.tolist() == pytest.approx([math.log(2)], rel=1e-6)


def test_full_softmax_maps_item_j_plus_1_to_column_j() -> None:
    # Columns are items 1, 2, 3 with weights 1, 2, 5 of 8.
    logit_MN = torch.tensor([[0.0, math.log(2), math.log(5)]]).repeat(4, 1).requires_grad_()
    loss_M = losses.full_softmax(logit_MN, torch.tensor([1, 2, 3, 0]))
    assert loss_M.tolist() == pytest.approx([math.log(8), math.log(4), math.log(8 / 5), 0.0], rel=1e-6)
    loss_M.sum().backward()
    assert logit_MN.grad is not None
    # Softmax minus one-hot for target 3; the padding row gets nothing.
    assert logit_MN.grad[2].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8 - 1], rel=1e-5)
    assert logit_MN.grad[3].tolist() == [0.0, 0.0, 0.0]


def test_full_softmax_refuses_an_id_past_the_catalog() -> None:
    with pytest.raises(IndexError):
        losses.full_softmax(torch.zeros(1, 3), torch.tensor([4]))


def test_sampled_softmax_over_all_other_items_is_full_softmax() -> None:
    logit_MN = random_scores(4, 5, 8)
    ours_M = losses.sampled_softmax(logit_MN[:, 0], logit_MN[:, 1:])
    torch.testing.assert_close(ours_M, losses.full_softmax(logit_MN, torch.ones(5)))


# --- distillation ---


def test_distillation_by_hand() -> None:
    # (1-0)² + (2-0)² + (0-2)² + (0-0)² = 9; over four dimensions 9/4. Second row: equal vectors.
    student_BD = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    teacher_BD = torch.tensor([[0.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert losses.distillation(student_BD, teacher_BD, "mean").tolist() == [2.25, 0.0]
    assert losses.distillation(student_BD, teacher_BD, "sum").tolist() == [9.0, 0.0]


def test_distillation_mean_over_rows_is_the_official_mse() -> None:
    student_BD, teacher_BD = random_scores(5, 6, 128), random_scores(6, 6, 128)
    official = torch.nn.functional.mse_loss(student_BD, teacher_BD)
    torch.testing.assert_close(losses.distillation(student_BD, teacher_BD, "mean").mean(), official)


def test_contrastive_distillation_by_hand() -> None:
    # Unit directions: student 0 = teacher 0, student 1 at 60 degrees to teacher 1 and 30 to teacher 0.
    # Lengths (2, 3, 5) must not matter. Temperature 1/2: logits are cosine · 2.
    student_BD = torch.tensor([[2.0, 0.0], [math.sqrt(3) / 2, 0.5]])
    teacher_BD = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    a, b, c, d = math.exp(2.0), math.exp(0.0), math.exp(math.sqrt(3)), math.exp(1.0)
    forward_B = [-math.log(a / (a + b)), -math.log(d / (c + d))]  # over teachers (rows)
    backward_B = [-math.log(a / (a + c)), -math.log(d / (b + d))]  # over students (columns)
    loss_B = losses.contrastive_distillation(student_BD, teacher_BD, temperature=0.5)
    assert loss_B.tolist() == pytest.approx(forward_B, rel=1e-5)
    both_B = losses.contrastive_distillation(student_BD, teacher_BD, temperature=0.5, symmetric=True)
    assert both_B.tolist() == pytest.approx([(f + r) / 2 for f, r in zip(forward_B, backward_B, strict=True)], rel=1e-5)


def test_contrastive_distillation_of_one_user_is_0_and_refuses_a_temperature_of_0() -> None:
    assert losses.contrastive_distillation(torch.ones(1, 3), -torch.ones(1, 3)).tolist() == [0.0]
    with pytest.raises(ValueError, match="must be positive"):
        losses.contrastive_distillation(torch.ones(1, 3), torch.ones(1, 3), temperature=0.0)


def test_contrastive_distillation_ignores_autocast() -> None:
    student_BD, teacher_BD = random_scores(7, 9, 16).float(), random_scores(8, 9, 16).float()
    expected_B = losses.contrastive_distillation(student_BD, teacher_BD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.contrastive_distillation(student_BD, teacher_BD), expected_B)


# --- uniformity ---


def test_uniformity_by_hand() -> None:
    # Squared distances: (0,0)-(1,0) = 1, (0,0)-(0,1) = 1, (1,0)-(0,1) = 2.
    x_BD = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    expected = (2 * math.exp(-2) + math.exp(-4)) / 3
    assert losses.uniformity(x_BD).item() == pytest.approx(expected, rel=1e-6)


def test_uniformity_of_spread_unit_vectors_in_128_dimensions() -> None:
    # Orthogonal unit vectors: distance² = 2, so e^-4 = 0.0183, the "spread" value of the official code.
    assert losses.uniformity(torch.eye(128)).item() == pytest.approx(math.exp(-4), rel=1e-6)


@pytest.mark.parametrize("num_users", [0, 1])
def test_uniformity_without_a_pair_is_0_with_a_gradient(num_users: int) -> None:
    x_BD = torch.ones(num_users, 4, requires_grad=True)
    loss = losses.uniformity(x_BD)
    loss.backward()
    assert loss.item() == 0.0
    assert x_BD.grad is not None
    assert torch.equal(x_BD.grad, torch.zeros(num_users, 4))


def test_uniformity_of_identical_rows_is_1_with_a_finite_gradient() -> None:
    x_BD = torch.ones(5, 4, requires_grad=True)
    loss = losses.uniformity(x_BD)
    loss.backward()
    assert loss.item() == 1.0
    assert x_BD.grad is not None
    assert torch.equal(x_BD.grad, torch.zeros(5, 4))


def test_uniformity_with_the_diagonal_is_the_papers_equation_3() -> None:
    num_users = 6
    x_BD = random_scores(9, num_users, 3)
    square_BB = (x_BD.unsqueeze(0) - x_BD.unsqueeze(1)).square().sum(dim=-1)
    paper = torch.exp(-2 * square_BB).mean()
    ours = 1 / num_users + (1 - 1 / num_users) * losses.uniformity(x_BD)
    torch.testing.assert_close(ours, paper)


def test_uniformity_keeps_its_digits_far_from_the_origin() -> None:
    near_BD = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.25]])
    torch.testing.assert_close(losses.uniformity(near_BD + 4096.0), losses.uniformity(near_BD))


# --- all ---

TWO_INPUTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: losses.binary_cross_entropy(x[:, 0], y),
    lambda x, y: losses.gbce(x[:, 0], y, num_items=30, t=0.75),
    lambda x, y: losses.sampled_softmax(x[:, 0], y),
    lambda x, y: losses.full_softmax(x, torch.tensor([1, 3, 0, 4])),
    lambda x, y: losses.retrieval(x),
    lambda x, y: losses.distillation(x, y, "mean"),
    lambda x, y: losses.uniformity(x).expand(1),
    lambda x, y: losses.contrastive_distillation(x, y, symmetric=True),
]


@pytest.mark.parametrize("loss", TWO_INPUTS)
def test_gradients_match_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = random_scores(10, 4, 5).requires_grad_(), random_scores(11, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b) + 0 * b.sum(), (x, y))


@pytest.mark.parametrize("loss", TWO_INPUTS)
def test_bf16_inputs_are_computed_in_fp32(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = random_scores(12, 4, 5).bfloat16(), random_scores(13, 4, 5).bfloat16()
    value = loss(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(x.float(), y.float()))


# --- BPR-max and the whole catalog ---


def test_bpr_max_by_hand() -> None:
    # r⁺ = 0, r⁻ = (0, ln 3): w = (1/4, 3/4), σ(0) = 1/2, σ(-ln 3) = 1/4: the sum is 1/8 + 3/16 = 5/16.
    # Regularisation: 2 · 3/4 · (ln 3)².
    positive_M, negative_MK = torch.zeros(1), torch.tensor([[0.0, math.log(3)]])
    loss_M = losses.bpr_max(positive_M, negative_MK, regularization=2.0, elu=0.0)
    assert loss_M.shape == (1,)
    assert loss_M.item() == pytest.approx(math.log(16 / 5) + 1.5 * math.log(3) ** 2, rel=1e-6)


def test_bpr_max_of_elu_scores() -> None:
    positive_M, negative_MK = random_scores(20, 6) * 3, random_scores(21, 6, 5) * 3

    def elu(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.7 * (x.exp() - 1))

    expected_M = losses.bpr_max(elu(positive_M), elu(negative_MK), regularization=0.3, elu=0.0)
    found_M = losses.bpr_max(positive_M, negative_MK, regularization=0.3, elu=0.7)
    torch.testing.assert_close(found_M, expected_M)


def test_bpr_max_stays_finite_where_the_official_code_cuts_off() -> None:
    """σ(-200) is 0 in fp32: the official code then takes the log of 1e-24, which has no gradient."""
    positive_M = torch.full((1,), -200.0, requires_grad=True)
    loss = losses.bpr_max(positive_M, torch.zeros(1, 3), regularization=0.0, elu=0.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    assert positive_M.grad is not None
    assert positive_M.grad.item() == pytest.approx(-1.0, rel=1e-4)


def test_the_catalog_in_chunks_equals_the_whole_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    target_M = torch.tensor([3, 1, 9, 0, 4, 4, 2])

    def run() -> tuple[Tensor, Tensor, Tensor, int]:
        state_MD, item_ND = random_scores(22, 7, 5).requires_grad_(), random_scores(23, 9, 5).requires_grad_()
        kept: list[int] = []

        def note(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss_M = losses.catalog_softmax(state_MD, item_ND, target_M)
        (loss_M * torch.arange(7)).sum().backward()
        assert state_MD.grad is not None
        assert item_ND.grad is not None
        return loss_M.detach(), state_MD.grad, item_ND.grad, max(kept)

    whole = run()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 20)  # two rows of nine
    parts = run()
    for found, expected in zip(parts[:3], whole[:3], strict=True):
        torch.testing.assert_close(found, expected)
    expected_M = losses.full_softmax(random_scores(22, 7, 5) @ random_scores(23, 9, 5).T, target_M)
    torch.testing.assert_close(whole[0], expected_M)
    assert whole[3] == 7 * 9, "all logits are saved for the backward pass"
    assert parts[3] <= 9 * 5, "no logits are saved, only states and items"
