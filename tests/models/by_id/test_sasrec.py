"""SASRec against the equations written out, and independence of padding and batch split."""

from __future__ import annotations

import math

import pytest
import torch
from id_helpers import blocks_of
from torch import Tensor, nn

from trainer.config import SASRecConfig
from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences, positions_with_loss
from trainer.data.collators.sequences import SequenceTraining
from trainer.models.by_id import buckets
from trainer.models.by_id.sasrec import SASRec, _Block, _scores
from trainer.nn.causal_attention import CausalAttention

ITEMS = 9


def _model(**settings: object) -> SASRec:
    torch.manual_seed(0)
    config = SASRecConfig.model_validate(
        {"name": "sasrec", "dim": 8, "max_length": 6, "heads": 2, "dropout": 0.0, **settings}
    )
    model = SASRec(config, ITEMS)
    with torch.no_grad():  # norms and biases away from 1 and 0, so that leaving one out shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.items.weight[0] = 0.0
    return model


def _sequences(rows: list[list[int]], length: int) -> ItemSequences:
    padded = [[0] * (length - len(row)) + row for row in rows]
    return ItemSequences(torch.tensor(padded), BatchRows(0, len(rows), len(rows)))


def _encode(model: SASRec, batch: ItemSequences) -> Tensor:
    """(B, L, D) states after the last norm, zero at padding."""
    slots = model._slots(batch)
    encoded_BLD: Tensor = model.norm(model._states(batch, model.blocks, slots))[slots.buckets.slot_BL.clamp(min=0)]
    return encoded_BLD * (batch.item_BL > 0)[:, :, None]


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-8).sqrt() * layer.weight + layer.bias


def _by_hand(model: SASRec, items: list[int]) -> Tensor:
    """The published computation for one user without padding, one position and one head at a time."""
    config = model.config
    first = config.max_length - len(items)
    x = [
        model.items.weight[item] * math.sqrt(config.dim) + model.positions.weight[first + place]
        for place, item in enumerate(items)
    ]
    for block in blocks_of(model.blocks, _Block):
        original, pre = config.norm == "original", config.norm == "pre"
        query = [_norm(v, block.attention_norm) for v in x] if original or pre else x
        memory = query if pre else x
        attended = [_attend(block.attention, query[i], memory[: i + 1], config.heads) for i in range(len(x))]
        if original:
            x = [_norm(q + a, block.feed_norm) for q, a in zip(query, attended, strict=True)]
            x = [v + _loader(block, v) for v in x]
        elif pre:
            x = [v + a for v, a in zip(x, attended, strict=True)]
            x = [v + _loader(block, _norm(v, block.feed_norm)) for v in x]
        else:
            x = [_norm(v + a, block.attention_norm) for v, a in zip(x, attended, strict=True)]
            x = [_norm(v + _loader(block, v), block.feed_norm) for v in x]
    return torch.stack([_norm(v, model.norm) for v in x])


def _attend(attention: CausalAttention, query: Tensor, memory: list[Tensor], heads: int) -> Tensor:
    q, width = attention.query(query), len(query) // heads
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.stack([q[part] @ attention.key(m)[part] for m in memory]) / math.sqrt(width)
        values = torch.stack([attention.value(m)[part] for m in memory])
        mixed.append(scores.softmax(0) @ values)
    attended: Tensor = attention.out(torch.cat(mixed))
    return attended


def _loader(block: _Block, x: Tensor) -> Tensor:
    fed: Tensor = block.contract(block.expand(x).clamp(min=0))
    return fed


@pytest.mark.parametrize("norm", ["original", "pre", "post"])
def test_equals_the_equations_by_hand(norm: str) -> None:
    model = _model(norm=norm)
    items = [3, 1, 4, 1, 5]
    expected = _by_hand(model, items)
    torch.testing.assert_close(_encode(model, _sequences([items], 5))[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.user_vectors(_sequences([items], 5))[0], expected[-1], rtol=1e-5, atol=1e-5)


def test_padding_and_trimming_change_nothing() -> None:
    model = _model()
    alone = model.user_vectors(_sequences([[2, 7, 3]], 3))
    for length in (4, 6):
        torch.testing.assert_close(model.user_vectors(_sequences([[2, 7, 3], [1]], length))[:1], alone)


def test_without_the_padding_mask_attention_sees_padding() -> None:
    model = _model(mask_padding=False)
    alone = model.user_vectors(_sequences([[2, 7, 3]], 3))
    assert not torch.allclose(model.user_vectors(_sequences([[2, 7, 3]], 6)), alone, atol=1e-4)


def test_a_position_sees_nothing_after_it() -> None:
    model = _model()
    first = _encode(model, _sequences([[2, 7, 3, 4]], 6))
    second = _encode(model, _sequences([[2, 7, 3, 9]], 6))
    torch.testing.assert_close(first[0, :5], second[0, :5])
    assert not torch.allclose(first[0, 5], second[0, 5])


def _training_batch() -> SequenceTraining:
    inputs = _sequences([[1, 2, 3], [4]], 3)
    target = torch.tensor([[2, 3, 5], [0, 0, 6]])
    negative = torch.tensor([[[7], [8], [9]], [[7], [7], [1]]])
    return SequenceTraining(torch.tensor([0, 1]), inputs, target, negative, torch.tensor([0, 1, 2, 5]))


def test_bce_over_real_positions_by_hand() -> None:
    model = _model()
    batch = _training_batch()
    hidden = _encode(model, batch.input)
    table = model.items.weight
    by_hand = []
    for row, place in [(0, 0), (0, 1), (0, 2), (1, 2)]:
        h = hidden[row, place]
        positive, negative = h @ table[batch.target_BL[row, place]], h @ table[batch.negative_BLK[row, place, 0]]
        by_hand.append(-torch.log(torch.sigmoid(positive)) - torch.log(1 - torch.sigmoid(negative)))
    terms = model(batch)
    torch.testing.assert_close(terms.loss_B, torch.stack([torch.stack(by_hand[:3]).sum(), by_hand[3]]))
    torch.testing.assert_close(terms.count_B, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(model.loss(terms).total, torch.stack(by_hand).mean())


def test_scores_of_few_and_of_many_candidates_are_inner_products() -> None:
    for candidates in (1, 5, 6, 20):
        hidden_MD, candidate_MCD = torch.randn(4, 8), torch.randn(4, candidates, 8)
        by_hand = [[float(h @ c) for c in row] for h, row in zip(hidden_MD, candidate_MCD, strict=True)]
        torch.testing.assert_close(_scores(hidden_MD, candidate_MCD), torch.tensor(by_hand))


def test_full_softmax_by_hand() -> None:
    model = _model(loss="full_softmax")
    batch = _training_batch()
    hidden = _encode(model, batch.input)
    logits = hidden[1, 2] @ model.items.weight[1:].T
    torch.testing.assert_close(model(batch).loss_B[1], -logits.log_softmax(0)[6 - 1])


def test_gbce_with_t_0_is_bce_and_other_losses_differ() -> None:
    batch = _training_batch()
    bce = _model()(batch).loss_B
    assert torch.equal(_model(loss="gbce", gbce_t=0.0)(batch).loss_B, bce)
    assert not torch.allclose(_model(loss="gbce", gbce_t=0.75)(batch).loss_B, bce)
    assert not torch.allclose(_model(loss="sampled_softmax")(batch).loss_B, bce)


def _dense(model: SASRec, batch: ItemSequences) -> Tensor:
    """(B, L, D) states of a whole padded batch with a mask, as computed before rows were put into buckets."""
    item_BL = batch.item_BL
    length = item_BL.shape[1]
    real_BL1 = (item_BL > 0)[:, :, None]
    position_L = torch.arange(model.config.max_length - length, model.config.max_length)
    visible_BLL = torch.ones(length, length).bool().tril()[None]
    if model.config.mask_padding:
        visible_BLL = visible_BLL & ((item_BL > 0)[:, None, :] | torch.eye(length).bool())

    def attend(attention: CausalAttention, query_BLD: Tensor, memory_BLD: Tensor) -> Tensor:
        q, k, v = attention.query(query_BLD), attention.key(memory_BLD), attention.value(memory_BLD)
        width = q.shape[-1] // model.config.heads
        mixed = []
        for one, two, three in zip(q.split(width, -1), k.split(width, -1), v.split(width, -1), strict=True):
            score_BLL = one @ two.transpose(1, 2) / width**0.5
            mixed.append(score_BLL.masked_fill(~visible_BLL, float("-inf")).softmax(-1) @ three)
        attended: Tensor = attention.out(torch.cat(mixed, -1))
        return attended

    x = (model.items(item_BL) * model.config.dim**0.5 + model.positions(position_L)) * real_BL1
    for block in blocks_of(model.blocks, _Block):
        if model.config.norm == "post":
            x = block.attention_norm(x + attend(block.attention, x, x))
            x = block.feed_norm(x + _loader(block, x))
        elif model.config.norm == "pre":
            query = block.attention_norm(x)
            x = x + attend(block.attention, query, query)
            x = x + _loader(block, block.feed_norm(x))
        else:
            query = block.attention_norm(x)
            x = block.feed_norm(query + attend(block.attention, query, x))
            x = x + _loader(block, x)
        x = x * real_BL1
    dense: Tensor = model.norm(x)
    return dense


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("norm", ["original", "pre", "post"])
def test_buckets_change_neither_losses_nor_gradients(
    norm: str, mask_padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_SLOTS", 150)  # several buckets, some of a single row
    model = _model(norm=norm, mask_padding=mask_padding, max_length=150).double()
    torch.manual_seed(2)
    lengths = [3, 149, 1, 70, 64, 90, 0, 20, 20]
    rows = [torch.randint(1, ITEMS + 1, (length + 1,)).tolist() for length in lengths]
    inputs, targets = _sequences([row[:-1] for row in rows], 150), _sequences([row[1:] for row in rows], 150)
    target_BL = targets.item_BL * (inputs.item_BL > 0)
    negative_BLK, position_M = torch.randint(1, ITEMS + 1, (9, 150, 2)), positions_with_loss(target_BL.numpy())
    batch = SequenceTraining(torch.arange(9), inputs, target_BL, negative_BLK, position_M)
    real_BL = target_BL > 0
    dense_BLD = _dense(model, inputs)
    loss_M = model._position_loss(dense_BLD[real_BL], target_BL[real_BL], batch.negative_BLK[real_BL])
    total = model.loss(model(batch)).total
    torch.testing.assert_close(total, loss_M.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.user_vectors(inputs), dense_BLD[:, -1])
    parameters = list(model.parameters())
    for found, dense in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(loss_M.mean(), parameters), strict=True
    ):
        torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-12)


def test_user_vectors_drop_out_as_the_last_positions_of_training_do() -> None:
    for norm in ("original", "pre", "post"):
        model = _model(dropout=0.5, norm=norm).train()
        batch = _sequences([[1, 2, 3], [4, 5], [6], [7, 8, 9]], 4)
        torch.manual_seed(5)
        whole_BLD = _encode(model, batch)
        torch.manual_seed(5)
        torch.testing.assert_close(model.user_vectors(batch), whole_BLD[:, -1])


def test_dropout_does_not_depend_on_how_a_batch_is_split() -> None:
    model = _model(dropout=0.5).train()
    rows = [[1, 2, 3], [4, 5], [6], [7, 8, 9]]
    torch.manual_seed(5)
    whole = _encode(model, _sequences(rows, 3))
    for start, stop in [(0, 1), (1, 3), (3, 4)]:
        part = ItemSequences(_sequences(rows[start:stop], 3).item_BL, BatchRows(start, stop - start, 4))
        torch.manual_seed(5)
        torch.testing.assert_close(_encode(model, part), whole[start:stop])
    model.eval()
    assert not torch.allclose(_encode(model, _sequences(rows, 3)), whole)


def test_item_vectors_are_rows_of_the_table_and_padding_is_zero() -> None:
    config = SASRecConfig(name="sasrec", dim=8)
    model = SASRec(config, ITEMS)
    assert model.item_vectors(ItemIds(torch.tensor([0]))).abs().sum() == 0
    assert torch.equal(model.item_vectors(ItemIds(torch.tensor([3]))), model.items.weight[3:4])
