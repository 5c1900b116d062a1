"""BERT4Rec against the equations of its paper, one position and one head at a time."""

from __future__ import annotations

import math

import torch
from id_helpers import blocks_of, catalog_loss, normalized, padded, perturbed, sequences
from torch import Tensor, nn

from trainer.config import BERT4RecConfig
from trainer.data.collators.base import ItemIds
from trainer.data.collators.masking import MaskedTraining
from trainer.models.by_id.bert4rec import BERT4Rec, _Block
from trainer.nn.self_attention import Attention

ITEMS, MASK = 9, 10


def _model(**settings: object) -> BERT4Rec:
    sizes = {"name": "bert4rec", "dim": 8, "max_length": 6, "heads": 2, "dropout": 0.0}
    return perturbed(BERT4Rec(BERT4RecConfig.model_validate({**sizes, **settings}), ITEMS))


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _by_hand(model: BERT4Rec, ids: list[int]) -> list[Tensor]:
    """Output of the head at each position: Equations 1 to 7 for one user without padding."""
    first = model.config.max_length - len(ids)
    x = [
        normalized(model.items.vectors.weight[item] + model.positions.weight[first + place], model.norm)
        for place, item in enumerate(ids)
    ]
    for block in blocks_of(model.blocks, _Block):
        attended = [_attend(block.attention, query, x, model.config.heads) for query in x]
        x = [normalized(v + a, block.attention_norm) for v, a in zip(x, attended, strict=True)]
        fed = [block.contract(_gelu(block.expand(v))) for v in x]
        x = [normalized(v + f, block.feed_norm) for v, f in zip(x, fed, strict=True)]
    dense, _, norm = model.head
    assert isinstance(norm, nn.LayerNorm)
    return [normalized(_gelu(dense(v)), norm) for v in x]


def _attend(attention: Attention, query: Tensor, memory: list[Tensor], heads: int) -> Tensor:
    q, width = attention.query(query), len(query) // heads
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.stack([q[part] @ attention.key(m)[part] for m in memory]) / math.sqrt(width)
        mixed.append(scores.softmax(0) @ torch.stack([attention.value(m)[part] for m in memory]))
    attended: Tensor = attention.out(torch.cat(mixed))
    return attended


def test_scores_equal_the_equations_by_hand() -> None:
    model = _model()
    state = _by_hand(model, [3, 1, 4, 1, MASK])[-1]
    expected = model.items.vectors.weight[[2, 7]] @ state + model.items.bias.weight[[2, 7], 0]
    user = model.user_vectors(sequences([[3, 1, 4, 1, MASK]], 6))[0]
    torch.testing.assert_close(model.item_vectors(ItemIds(torch.tensor([2, 7]))) @ user, expected, rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_of_each_sequences_masks() -> None:
    """Equation 8 per sequence; sequences have equal weight, however many masks they have."""
    model = _model()
    batch = MaskedTraining(
        user_B=torch.tensor([0, 1]),
        input=sequences([[1, MASK, 3, MASK], [4, MASK]], 4),
        target_BL=padded([[0, 2, 0, 5], [0, 6]], 4),
        position_M=torch.tensor([1, 3, 7]),
    )
    vectors, biases = model.items.vectors.weight[1 : ITEMS + 1], model.items.bias.weight[1:, 0]
    first, second = _by_hand(model, [1, MASK, 3, MASK]), _by_hand(model, [4, MASK])
    two = catalog_loss(first[1], vectors, biases, 2) + catalog_loss(first[3], vectors, biases, 5)
    one = catalog_loss(second[1], vectors, biases, 6)
    terms = model(batch)
    torch.testing.assert_close(terms.loss_B, torch.stack([two, one]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.loss(terms).total, (two / 2 + one) / 2, rtol=1e-4, atol=1e-5)


def test_a_mask_sees_what_comes_after_it() -> None:
    model = _model()
    one, other = (model._encode(sequences([[2, MASK, 3, last]], 6)) for last in (4, 9))
    assert not torch.allclose(one[0, 3], other[0, 3], atol=1e-4)


def test_the_mask_is_not_an_item() -> None:
    """It has an input embedding but is never scored."""
    model = _model()
    assert model.items.catalog().shape == (ITEMS, 8 + 1)
    assert len(model.items.vectors.weight) == ITEMS + 2
