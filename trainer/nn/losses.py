"""The losses of LLM-SRec and of its baselines: pure functions of tensors, without parameters.

Each returns one value per row, so that the caller averages over the *global* batch and the result does not
depend on the number of ranks. Only `uniformity` returns a scalar, because it averages over pairs of rows. It and
`contrastive_distillation` couple rows: pass them the rows of the whole global batch.

Low-precision inputs are computed in fp32. Nothing here needs float64, which Gaudi lacks.

Letters: B users of the global batch, C candidates, D dimensions, K sampled negatives, M positions or items,
N items of the catalog, P pairs, Y targets.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26
"""Most logits that `catalog_softmax` holds at once: 256 MiB in fp32."""
PADDING_COLUMN = -1
"""Column of item id 0 (padding), once ids 1..N are mapped to columns 0..N-1."""


def binary_cross_entropy(positive_M: Tensor, negative_MK: Tensor) -> Tensor:
    """SASRec's loss per position: -log σ(s⁺) - Σ_k log(1 - σ(s⁻_k)), shape (M,), in nats.

    The negatives are *summed*, which at K = 1 is SASRec's sum of two BCE means. gSASRec's code divides the
    whole by K + 1 instead, a constant factor.
    """
    return _weighted_cross_entropy(positive_M, negative_MK, beta=1.0)


def gbce(positive_M: Tensor, negative_MK: Tensor, num_items: int, t: float) -> Tensor:
    """gSASRec's generalised BCE per position: -log σ(s⁺)^β - Σ_k log(1 - σ(s⁻_k)), shape (M,).

    α = K / (num_items - 1), β = α (t (1 - 1/α) + 1/α). `t` = 0 is exactly
    `binary_cross_entropy`; `t` = 1 undoes all of the over-confidence that negative sampling causes.

    gSASRec's code turns s⁺ into log(1 / (σ(s⁺)^-β - 1)), in float64 because that overflows, then applies BCE.
    Since σ of that expression is σ(s⁺)^β, the term is β · -log σ(s⁺), stable in fp32 as is.

    Raises:
        ValueError: `t` is outside [0, 1], or there are more negatives than items other than the target.
    """
    num_negatives = negative_MK.shape[-1]
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"gBCE's t must be in [0, 1], not {t}")
    if not 1 <= num_negatives <= num_items - 1:
        raise ValueError(
            f"gBCE with {num_negatives} negatives needs at least {num_negatives + 1} items, and the catalog "
            f"has {num_items}: use between 1 and {max(num_items - 1, 1)} negatives"
        )
    alpha = num_negatives / (num_items - 1)
    # α (t (1 - 1/α) + 1/α) multiplied out: dividing by α and multiplying back can miss β = 1 at t = 0.
    beta = 1.0 - t * (1.0 - alpha)
    return _weighted_cross_entropy(positive_M, negative_MK, beta)


def sampled_softmax(positive_M: Tensor, negative_MK: Tensor) -> Tensor:
    """Cross-entropy of the positive among itself and its K negatives, shape (M,), with no logQ correction."""
    _check_rows(positive_M, negative_MK)
    return retrieval(torch.cat((positive_M.unsqueeze(-1), negative_MK), dim=-1))


def full_softmax(logit_MN: Tensor, target_M: Tensor) -> Tensor:
    """Cross-entropy over the whole catalog, shape (M,).

    `target_M` holds item *ids* 1..N and column j scores item j + 1: drop the padding row of a (N + 1)-row
    item table before multiplying. A target of 0 is padding: its loss is 0 and it sends no gradient.
    """
    assert logit_MN.ndim == 2, logit_MN.shape
    assert target_M.shape == logit_MN.shape[:1], (logit_MN.shape, target_M.shape)
    return F.cross_entropy(
        _full_precision(logit_MN), target_M.long() - 1, ignore_index=PADDING_COLUMN, reduction="none"
    )


def catalog_softmax(state_MD: Tensor, item_ND: Tensor, target_M: Tensor) -> Tensor:
    """`full_softmax` of the inner products of states and items, shape (M,), never holding all M x N of them.

    Above `LOGITS_AT_ONCE` logits it works in chunks of states and recomputes each chunk's logits in the backward
    pass: a third more work, and memory that does not grow with M x N.
    """
    rows = max(1, LOGITS_AT_ONCE // len(item_ND))
    if len(state_MD) <= rows:
        return full_softmax(state_MD @ item_ND.T, target_M)
    chunks = zip(torch.split(state_MD, rows), torch.split(target_M, rows), strict=True)
    return torch.cat(
        [
            checkpoint(_logits_softmax, chunk_MD, item_ND, chunk_M, use_reentrant=False, preserve_rng_state=False)
            for chunk_MD, chunk_M in chunks
        ]
    )


def bpr_max(positive_M: Tensor, negative_MK: Tensor, regularization: float, elu: float) -> Tensor:
    """BPR-max per position (Hidasi & Karatzoglou 2018): -log Σ_j w_j σ(r_i - r_j) + λ Σ_j w_j r_j², (M,).

    w is the softmax over the K negatives and λ = `regularization`. With `elu` > 0 the r are ELU(score) with that
    alpha, as in the official code: low scores then stop pulling on the regularisation.
    """
    _check_rows(positive_M, negative_MK)
    positive_M, negative_MK = _full_precision(positive_M), _full_precision(negative_MK)
    if elu > 0.0:
        positive_M, negative_MK = F.elu(positive_M, elu), F.elu(negative_MK, elu)
    log_weight_MK = negative_MK.log_softmax(dim=-1)
    # log Σ w σ as a log-sum-exp, which is stable; the official code adds 1e-24 inside the log instead.
    win_M = torch.logsumexp(log_weight_MK + F.logsigmoid(positive_M[:, None] - negative_MK), dim=-1)
    return -win_M + regularization * (log_weight_MK.exp() * negative_MK.square()).sum(dim=-1)


def batch_softmax(score_YM: Tensor, target_Y: Tensor, excluded_YM: Tensor, log_q_M: Tensor | None = None) -> Tensor:
    """Cross-entropy of each target among the M items of a batch, shape (Y,).

    Args:
        target_Y: column of each target, which is not excluded.
        excluded_YM: True where an item is not scored against a target.
        log_q_M: log-probability that an item is among the M; subtracted from its scores (sampled softmax with shared
            candidates, Bengio & Senécal 2008), because otherwise an item is a negative as often as it is popular.
    """
    score_YM = _full_precision(score_YM)
    if log_q_M is not None:
        score_YM = score_YM - log_q_M
    return F.cross_entropy(score_YM.masked_fill(excluded_YM, float("-inf")), target_Y, reduction="none")


def score_distillation(score_YM: Tensor, teacher_YM: Tensor, excluded_YM: Tensor) -> Tensor:
    """Cross-entropy of the student's distribution over the items of a batch against the teacher's, shape (Y,).

    Args:
        excluded_YM: True where an item does not count.
    """
    lowest = torch.finfo(torch.float32).min  # not -inf, whose product with a probability of 0 is NaN
    student_YM = _full_precision(score_YM).masked_fill(excluded_YM, lowest).log_softmax(-1)
    teacher_YM = _full_precision(teacher_YM).masked_fill(excluded_YM, lowest).softmax(-1)
    return -(teacher_YM * student_YM).masked_fill(excluded_YM, 0.0).sum(-1)


def retrieval(score_BC: Tensor) -> Tensor:
    """Eq. 1, next item retrieval: cross-entropy of column 0 (the target) among C candidates, shape (B,)."""
    assert score_BC.ndim == 2, score_BC.shape
    return -F.log_softmax(_full_precision(score_BC), dim=-1)[:, 0]


def distillation(student_BD: Tensor, teacher_BD: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Eq. 2, squared error between the user vectors of LLM and CF-SRec, over dimensions, shape (B,).

    "mean" is the official code (at most 4 / D between unit vectors), "sum" the squared distance (at most 4).
    Inputs are not normalised here: the official code normalises both sides first, Eq. 2 does not.
    """
    assert student_BD.shape == teacher_BD.shape, (student_BD.shape, teacher_BD.shape)
    square_BD = (_full_precision(student_BD) - _full_precision(teacher_BD)).square()
    return square_BD.mean(dim=-1) if reduction == "mean" else square_BD.sum(dim=-1)


def uniformity(x_BD: Tensor) -> Tensor:
    """One of the two terms of Eq. 3: the mean of exp(-2 ‖x_i - x_j‖²) over pairs i < j, a scalar in [0, 1].

    As in the official code the pair of a user with itself is left out; with it the value would be
    1/B + (1 - 1/B) times this one. Fewer than two rows have no pair: the value is 0, still connected to
    `x_BD`, so that a last batch of one user neither gives NaN nor leaves a rank without a gradient.

    Takes about B² D / 2 floats (67 MB at B = 512, D = 128). A Gram matrix would take less, but would lose
    digits to cancellation between close vectors and change under TF32 or autocast; and the root of the
    squared distance has no gradient at 0.
    """
    x_BD = _full_precision(x_BD)
    if x_BD.shape[0] < 2:
        return 0.0 * x_BD.sum()
    first_P, second_P = torch.triu_indices(x_BD.shape[0], x_BD.shape[0], offset=1, device=x_BD.device)
    distance_P = (x_BD[first_P] - x_BD[second_P]).square().sum(dim=-1)
    return torch.exp(-2.0 * distance_P).mean()


def contrastive_distillation(
    student_BD: Tensor, teacher_BD: Tensor, temperature: float = 0.07, symmetric: bool = False
) -> Tensor:
    """Eq. 10: cross-entropy of each student vector's own teacher among the batch's B teachers, shape (B,).

    The similarity is cosine / `temperature`, as in the official code's unused helper. `symmetric` averages
    it with the cross-entropy of each teacher's own student.

    Raises:
        ValueError: `temperature` is not positive.
    """
    assert student_BD.shape == teacher_BD.shape, (student_BD.shape, teacher_BD.shape)
    if not temperature > 0.0:
        raise ValueError(f"the temperature of the contrastive distillation must be positive, not {temperature}")
    student_BD = F.normalize(_full_precision(student_BD), dim=-1)
    teacher_BD = F.normalize(_full_precision(teacher_BD), dim=-1)
    # Under bf16 autocast the cosine would be rounded to 0.004, which 1/0.07 turns into 0.06 in the logit.
    with torch.autocast(device_type=student_BD.device.type, enabled=False):
        logit_BB = student_BD @ teacher_BD.T / temperature
    loss_B = -F.log_softmax(logit_BB, dim=1).diagonal()
    if symmetric:
        loss_B = 0.5 * (loss_B - F.log_softmax(logit_BB, dim=0).diagonal())
    return loss_B


def _logits_softmax(state_MD: Tensor, item_ND: Tensor, target_M: Tensor) -> Tensor:
    return full_softmax(state_MD @ item_ND.T, target_M)


def _weighted_cross_entropy(positive_M: Tensor, negative_MK: Tensor, beta: float) -> Tensor:
    """-β log σ(s⁺) - Σ_k log σ(-s⁻_k), shape (M,), since 1 - σ(s) = σ(-s)."""
    _check_rows(positive_M, negative_MK)
    positive_M, negative_MK = _full_precision(positive_M), _full_precision(negative_MK)
    return -beta * F.logsigmoid(positive_M) - F.logsigmoid(-negative_MK).sum(dim=-1)


def _check_rows(positive_M: Tensor, negative_MK: Tensor) -> None:
    """Check shapes: a positive of shape (M, 1) would silently broadcast to an (M, M) loss."""
    assert positive_M.ndim == 1, positive_M.shape
    assert negative_MK.ndim == 2, negative_MK.shape
    assert negative_MK.shape[0] == positive_M.shape[0], (positive_M.shape, negative_MK.shape)


def _full_precision(x: Tensor) -> Tensor:
    """fp16 and bf16 cast to fp32; float64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()
