"""Initialisation of the read-outs f_user and f_item from data, before the first step.

Behind a frozen LLM, the hidden states of different users have a cosine above 0.99 and items likewise: heads with random
weights start with scores that are nearly equal, and training spends its first steps on telling anything apart.

    standardize        folds the mean and deviation of each hidden dimension, over a sample, into the first layers
    fit_to_teacher     then fits the last layers by ridge regression, so that user vectors predict those of the teacher
                       and item vectors its item table: scores start as far as the frozen LLM lets them, at the
                       teacher's

Letters: B users, Y targets, M items, X samples of any kind, F features before the last layer, D projected width, d
width of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.data.collators.base import ItemIds
from trainer.data.collators.retrieval import ItemPrompts, UserPrompts
from trainer.models.llm.retrieval import LLM4Rec

_SMALLEST_DEVIATION = 1e-6  # added, so that constant hidden dimensions do not divide by zero
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties to choose from, as shares of the mean squared length of a centred sample."""
_HELD_OUT = 5  # every fifth part of a sample chooses the penalty


@torch.no_grad()
def standardize(model: LLM4Rec, users: Sequence[UserPrompts], items: Sequence[ItemPrompts]) -> None:
    """Initialise f_user and f_item for standardized hidden states, with scores of standard deviation 1 on a sample.

    The sample's mean and deviation are folded into the first layer, so that the heads have the same size and can
    represent the same functions as before.
    """
    hidden_BD = torch.cat([model.users_hidden(batch) for batch in users])
    hidden_MD = torch.cat([model.items_hidden(batch) for batch in items])
    _standardize(model, hidden_BD, hidden_MD)
    # Both heads get half of the scale: a score is a product of their outputs.
    scale = (model.user_head(hidden_BD) @ model.item_head(hidden_MD).T).std() ** -0.5
    for head in (model.user_head, model.item_head):
        last = _last_layer(head)
        last.weight.mul_(scale)
        last.bias.mul_(scale)


@torch.no_grad()
def fit_to_teacher(
    model: LLM4Rec, users: Sequence[UserPrompts], items: Sequence[tuple[ItemIds, ItemPrompts]], seed: int
) -> None:
    """Initialise f_user, f_item and f_CF-user, if there is one, so that scores approximate the teacher's.

    Teacher vectors get from d to D dimensions by a random rotation, which keeps inner products if D >= d.

    Args:
        users: prompts of a sample, with the sequences that the teacher reads.
        items: ids and prompts of a sample.
        seed: of the rotation.
    """
    teacher = model.reader.teacher
    assert teacher is not None, "only a system with a teacher is fitted to one"
    hidden_YD = torch.cat([model.users_hidden(batch) for batch in users])
    hidden_MD = torch.cat([model.items_hidden(prompts) for _, prompts in items])
    _standardize(model, hidden_YD, hidden_MD)
    teacher_Yd = torch.cat([teacher.user_vectors(batch.sequence) for batch in users if batch.sequence is not None])
    table_Md = torch.cat([teacher.item_vectors(ids) for ids, _ in items])
    rotation_dD = _rotation(teacher_Yd.shape[1], _last_layer(model.user_head).out_features, seed).to(teacher_Yd)
    _fit_last_layer(model.user_head, hidden_YD, teacher_Yd @ rotation_dD)
    _fit_last_layer(model.item_head, hidden_MD, table_Md @ rotation_dD)
    if model.distillation is not None:  # the student's target must start where the student does
        _fit_last_layer(model.distillation.teacher_head, teacher_Yd, teacher_Yd @ rotation_dD)


def _standardize(model: LLM4Rec, hidden_BD: Tensor, hidden_MD: Tensor) -> None:
    for head, hidden_XD in ((model.user_head, hidden_BD), (model.item_head, hidden_MD)):
        first = head[0]
        assert isinstance(first, nn.Linear)
        first.weight.div_(hidden_XD.std(0) + _SMALLEST_DEVIATION)
        # With the weight divided already: W (h - mean) / std + b = W' h + (b - W' mean).
        first.bias.sub_(first.weight @ hidden_XD.mean(0))


def _last_layer(head: nn.Sequential) -> nn.Linear:
    last = head[-1]
    assert isinstance(last, nn.Linear)
    return last


def _rotation(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) with orthonormal rows, or columns if there are fewer of them."""
    normal = torch.randn(max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed))
    orthonormal: Tensor = torch.linalg.qr(normal)[0]
    return orthonormal.T if rows <= columns else orthonormal


def _fit_last_layer(head: nn.Sequential, input_XD: Tensor, target_XD: Tensor) -> None:
    """Fit a head's last layer, whose penalty is the one that predicts the last fifth of the sample best."""
    # On the CPU, once per run: Gaudi has no float64.
    feature_XF, target_XD = (x.cpu().double() for x in (head[:-1](input_XD), target_XD))
    kept = len(feature_XF) - len(feature_XF) // _HELD_OUT
    errors = []
    for penalty in _PENALTIES:
        weight_FD, bias_D = _ridge(feature_XF[:kept], target_XD[:kept], penalty)
        errors.append(float((feature_XF[kept:] @ weight_FD + bias_D - target_XD[kept:]).square().mean()))
    weight_FD, bias_D = _ridge(feature_XF, target_XD, _PENALTIES[errors.index(min(errors))])
    last = _last_layer(head)
    last.weight.copy_(weight_FD.T)
    last.bias.copy_(bias_D)


def _ridge(feature_XF: Tensor, target_XD: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (F, D) and bias (D,) of the ridge regression."""
    mean_F, mean_D = feature_XF.mean(0), target_XD.mean(0)
    centred_XF, centred_XD = feature_XF - mean_F, target_XD - mean_D
    ridge = penalty * centred_XF.square().sum(1).mean()
    if len(centred_XF) < centred_XF.shape[1]:  # the smaller of the two equivalent systems
        gram_XX = centred_XF @ centred_XF.T
        weight_FD = centred_XF.T @ torch.linalg.solve(gram_XX + ridge * torch.eye(len(gram_XX)).to(gram_XX), centred_XD)
    else:
        gram_FF = centred_XF.T @ centred_XF
        eye_FF = torch.eye(len(gram_FF)).to(gram_FF)
        weight_FD = torch.linalg.solve(gram_FF + ridge * eye_FF, centred_XF.T @ centred_XD)
    return weight_FD, mean_D - mean_F @ weight_FD
