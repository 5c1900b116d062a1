"""GRU4Rec against the equations of its papers, one gate and one step at a time."""

from __future__ import annotations

import pytest
import torch
from id_helpers import blocks_of, catalog_loss, padded, perturbed, sequences
from torch import Tensor, nn

from trainer.config import GRU4RecConfig
from trainer.data.collators.base import ItemIds
from trainer.data.collators.shared_negatives import SharedNegativeTraining
from trainer.models.by_id.gru4rec import GRU4Rec

ITEMS = 9


def _model(**settings: object) -> GRU4Rec:
    sizes = {"name": "gru4rec", "dim": 4, "hidden": 6, "max_length": 6, "dropout": 0.0}
    return perturbed(GRU4Rec(GRU4RecConfig.model_validate({**sizes, **settings}), ITEMS))


def _by_hand(model: GRU4Rec, items: list[int]) -> list[Tensor]:
    """The state after each item: reset gate r, update gate z, candidate n, h = (1 - z) n + z h."""
    x = [model.items.vectors.weight[item] for item in items]
    for layer in blocks_of(model.layers, nn.GRU):
        parameter = dict(layer.named_parameters())
        state, above = torch.zeros(layer.hidden_size), []
        for value in x:
            in_r, in_z, in_n = (parameter["weight_ih_l0"] @ value + parameter["bias_ih_l0"]).chunk(3)
            from_r, from_z, from_n = (parameter["weight_hh_l0"] @ state + parameter["bias_hh_l0"]).chunk(3)
            reset, update = torch.sigmoid(in_r + from_r), torch.sigmoid(in_z + from_z)
            candidate = torch.tanh(in_n + reset * from_n)
            state = (1 - update) * candidate + update * state
            above.append(state)
        x = above
    return [model.to_items(value) for value in x]


def _batch() -> SharedNegativeTraining:
    return SharedNegativeTraining(
        user_B=torch.tensor([0, 1]),
        input=sequences([[1, 2, 3], [4]], 3),
        target_BL=padded([[2, 3, 5], [6]], 3),
        negative_BK=torch.tensor([[7, 8], [9, 1]]),
        position_M=torch.tensor([0, 1, 2, 5]),
    )


@pytest.mark.parametrize(("layers", "hidden"), [(1, 4), (1, 6), (2, 6)])
def test_scores_equal_the_equations_by_hand(layers: int, hidden: int) -> None:
    model = _model(layers=layers, hidden=hidden)
    state = _by_hand(model, [3, 1, 4, 1, 5])[-1]
    expected = model.items.vectors.weight[[2, 7]] @ state + model.items.bias.weight[[2, 7], 0]
    found = model.item_vectors(ItemIds(torch.tensor([2, 7]))) @ model.user_vectors(sequences([[3, 1, 4, 1, 5]], 6))[0]
    torch.testing.assert_close(found, expected)


def test_without_a_layer_between_when_the_widths_agree() -> None:
    assert not list(_model(hidden=4).to_items.parameters())
    assert list(_model(hidden=6).to_items.parameters())


def test_cross_entropy_by_hand() -> None:
    model, batch = _model(), _batch()
    vectors, biases = model.items.vectors.weight[1:], model.items.bias.weight[1:, 0]
    first, second = _by_hand(model, [1, 2, 3]), _by_hand(model, [4])
    by_hand = [catalog_loss(state, vectors, biases, target) for state, target in zip(first, [2, 3, 5], strict=True)]
    by_hand.append(catalog_loss(second[0], vectors, biases, 6))
    terms = model(batch)
    torch.testing.assert_close(terms.loss_B, torch.stack([torch.stack(by_hand[:3]).sum(), by_hand[3]]))
    torch.testing.assert_close(terms.count_B, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(model.loss(terms).total, torch.stack(by_hand).mean())


def test_bpr_max_by_hand() -> None:
    model, batch = _model(loss="bpr_max", negatives=2, bpr_regularization=0.7, bpr_elu=0.5), _batch()
    (state,) = _by_hand(model, [4])

    def score(item: int) -> Tensor:
        value = model.items.vectors.weight[item] @ state + model.items.bias.weight[item, 0]
        return value if value > 0 else 0.5 * (value.exp() - 1)

    positive, negative = score(6), torch.stack([score(9), score(1)])
    weight = negative.exp() / negative.exp().sum()
    win = (weight * torch.sigmoid(positive - negative)).sum()
    expected = -win.log() + 0.7 * (weight * negative**2).sum()
    torch.testing.assert_close(model(batch).loss_B[1], expected)


def test_sampled_softmax_by_hand() -> None:
    model, batch = _model(loss="sampled_softmax", negatives=2), _batch()
    (state,) = _by_hand(model, [4])
    score = model.items.vectors.weight[[6, 9, 1]] @ state + model.items.bias.weight[[6, 9, 1], 0]
    torch.testing.assert_close(model(batch).loss_B[1], -score.log_softmax(0)[0])


def test_each_gate_starts_at_its_own_xavier_bound() -> None:
    torch.manual_seed(0)
    model = GRU4Rec(GRU4RecConfig(name="gru4rec", dim=64, hidden=100), ITEMS)
    [layer] = blocks_of(model.layers, nn.GRU)
    parameter = dict(layer.named_parameters())
    for gate in parameter["weight_ih_l0"].chunk(3):
        assert 0.9 * (6 / 164) ** 0.5 < gate.abs().max() <= (6 / 164) ** 0.5
    assert not parameter["bias_hh_l0"].any()
