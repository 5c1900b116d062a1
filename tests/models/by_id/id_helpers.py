"""Small batches of item ids, and models in which every parameter affects the output."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from trainer.data.collators.base import BatchRows, ItemSequences

ModelT = TypeVar("ModelT", bound=nn.Module)
BlockT = TypeVar("BlockT", bound=nn.Module)


def perturbed(model: ModelT) -> ModelT:
    """Move norms and biases away from 1 and 0, so that leaving one out shows; padding stays zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0
    return model


def blocks_of(layers: nn.ModuleList, kind: type[BlockT]) -> list[BlockT]:
    """The blocks, narrowed to their concrete type."""
    blocks = [layer for layer in layers if isinstance(layer, kind)]
    assert len(blocks) == len(layers)
    return blocks


def sequences(rows: list[list[int]], length: int) -> ItemSequences:
    """Item ids padded on the left to `length`."""
    return ItemSequences(padded(rows, length), BatchRows(0, len(rows), len(rows)))


def padded(rows: list[list[int]], length: int) -> Tensor:
    return torch.tensor([[0] * (length - len(row)) + row for row in rows])


def normalized(x_D: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Layer normalisation of one vector, written out."""
    return (x_D - x_D.mean()) / (x_D.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias


def catalog_loss(state_D: Tensor, vector_ND: Tensor, bias_N: Tensor, target: int) -> Tensor:
    """-log softmax of the target's score h·v + b over all items."""
    return -(vector_ND @ state_D + bias_N).log_softmax(0)[target - 1]
