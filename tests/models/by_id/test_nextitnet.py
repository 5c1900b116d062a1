"""NextItNet against the paper's two residual blocks, one position at a time."""

from __future__ import annotations

import pytest
import torch
from id_helpers import catalog_loss, normalized, padded, perturbed, sequences
from torch import Tensor, nn

from trainer.config import NextItNetConfig
from trainer.data.collators.base import ItemIds
from trainer.data.collators.sequences import SequenceTraining
from trainer.models.by_id.nextitnet import NextItNet, _OneLayerBlock, _TwoLayerBlock

ITEMS = 9


def _model(**settings: object) -> NextItNet:
    sizes = {"name": "nextitnet", "dim": 4, "max_length": 12, "dilations": [1, 2]}
    return perturbed(NextItNet(NextItNetConfig.model_validate({**sizes, **settings}), ITEMS))


def _convolved(layer: nn.Conv1d, x: list[Tensor], dilation: int) -> list[Tensor]:
    """Causal dilated convolution: a position from itself and earlier ones `dilation` apart, zero before the first."""
    kernel = layer.kernel_size[0]
    assert layer.bias is not None
    out = []
    for place in range(len(x)):
        value: Tensor = layer.bias
        for tap in range(kernel):
            source = place - (kernel - 1 - tap) * dilation
            if source >= 0:
                value = value + layer.weight[:, :, tap] @ x[source]
        out.append(value)
    return out


def _two_layer(block: _TwoLayerBlock, x: list[Tensor], dilation: int) -> list[Tensor]:
    x = _convolved(block.first.convolution, x, dilation)
    x = [normalized(v, block.first_norm).clamp(min=0) for v in x]
    x = _convolved(block.second.convolution, x, 2 * dilation)
    return [normalized(v, block.second_norm).clamp(min=0) for v in x]


def _one_layer(block: _OneLayerBlock, x: list[Tensor], dilation: int) -> list[Tensor]:
    x = [block.narrow(normalized(v, block.narrow_norm).clamp(min=0)) for v in x]
    x = [normalized(v, block.norm).clamp(min=0) for v in x]
    x = _convolved(block.convolution.convolution, x, dilation)
    return [block.widen(normalized(v, block.widen_norm).clamp(min=0)) for v in x]


def _added(kind: str, block: nn.Module, x: list[Tensor], dilation: int) -> list[Tensor]:
    if kind == "two_layer":
        assert isinstance(block, _TwoLayerBlock)
        return _two_layer(block, x, dilation)
    assert isinstance(block, _OneLayerBlock)
    return _one_layer(block, x, dilation)


def _by_hand(model: NextItNet, items: list[int]) -> list[Tensor]:
    x = [model.items.vectors.weight[item] for item in items]
    for block, dilation in zip(model.blocks, model.config.dilations, strict=True):
        x = [v + a for v, a in zip(x, _added(model.config.block, block, x, dilation), strict=True)]
    return [model.to_items(v) for v in x]


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("block", ["one_layer", "two_layer"])
def test_scores_equal_the_equations_by_hand(block: str, kernel: int) -> None:
    model = _model(block=block, kernel=kernel)
    items = [3, 1, 4, 1, 5, 9, 2, 6]
    state = _by_hand(model, items)[-1]
    expected = model.items.vectors.weight[[2, 7]] @ state + model.items.bias.weight[[2, 7], 0]
    user = model.user_vectors(sequences([items], 11))[0]
    torch.testing.assert_close(model.item_vectors(ItemIds(torch.tensor([2, 7]))) @ user, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["one_layer", "two_layer"])
def test_loss_of_every_real_position_by_hand(block: str) -> None:
    model = _model(block=block)
    batch = SequenceTraining(
        user_B=torch.tensor([0, 1]),
        input=sequences([[1, 2, 3], [4]], 3),
        target_BL=padded([[2, 3, 5], [6]], 3),
        negative_BLK=torch.zeros((2, 3, 0), dtype=torch.int64),
        position_M=torch.tensor([0, 1, 2, 5]),
    )
    vectors, biases = model.items.vectors.weight[1:], model.items.bias.weight[1:, 0]
    first, second = _by_hand(model, [1, 2, 3]), _by_hand(model, [4])
    by_hand = [catalog_loss(state, vectors, biases, target) for state, target in zip(first, [2, 3, 5], strict=True)]
    by_hand.append(catalog_loss(second[0], vectors, biases, 6))
    terms = model(batch)
    torch.testing.assert_close(
        terms.loss_B, torch.stack([torch.stack(by_hand[:3]).sum(), by_hand[3]]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model.loss(terms).total, torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-5)


def test_a_position_sees_its_receptive_field_and_nothing_after_it() -> None:
    """Two layers per block with dilations d and 2d and kernel size 3: 1 + 2 (1 + 2) = 7 positions at d = 1."""
    model = _model(dilations=[1])
    items = [3, 1, 4, 1, 5, 9, 2, 6]
    states = model._encode(sequences([items], 8))[0]
    for place in range(8):
        changed = model._encode(sequences([items[:place] + [8] + items[place + 1 :]], 8))[0]
        differs = [not torch.allclose(changed[i], states[i], atol=1e-6) for i in range(8)]
        assert differs == [place <= i < place + 7 for i in range(8)]
