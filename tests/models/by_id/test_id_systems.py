"""Results of every system that uses item ids are independent of padding and of the other users in a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from id_helpers import padded, perturbed, sequences
from torch import Tensor

from trainer.config import BERT4RecConfig, ConfigError, GRU4RecConfig, NextItNetConfig, SASRecConfig, parse_config
from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences, positions_with_loss
from trainer.data.collators.masking import MaskedTraining
from trainer.data.collators.sequences import SequenceTraining
from trainer.data.collators.shared_negatives import SharedNegativeTraining
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import AnySystem, build_system
from trainer.models.by_id.bert4rec import BERT4Rec
from trainer.models.by_id.gru4rec import GRU4Rec
from trainer.models.by_id.nextitnet import NextItNet
from trainer.models.by_id.sasrec import SASRec

ITEMS, MASK, LONGEST = 9, 10, 6
ROWS = [[1, 2, 3], [4], [5, 6, 7], [8, 9]]
TARGETS = [[2, 3, 5], [6], [6, 7, 1], [9, 2]]


def _sasrec(**settings: Any) -> SASRec:
    config = SASRecConfig.model_validate({"name": "sasrec", "dim": 8, "max_length": LONGEST, **settings})
    return perturbed(SASRec(config, ITEMS))


def _gru4rec(**settings: Any) -> GRU4Rec:
    base = {"name": "gru4rec", "dim": 8, "hidden": 6, "layers": 2, "max_length": LONGEST}
    dropout = settings.get("dropout", 0.0)
    return perturbed(GRU4Rec(GRU4RecConfig.model_validate({**base, "hidden_dropout": dropout, **settings}), ITEMS))


def _bert4rec(**settings: Any) -> BERT4Rec:
    config = BERT4RecConfig.model_validate({"name": "bert4rec", "dim": 8, "max_length": LONGEST, **settings})
    return perturbed(BERT4Rec(config, ITEMS))


def _nextitnet(**settings: Any) -> NextItNet:
    base = {"name": "nextitnet", "dim": 8, "max_length": LONGEST, "dilations": [1, 2]}
    return perturbed(NextItNet(NextItNetConfig.model_validate({**base, **settings}), ITEMS))


Model = SASRec | GRU4Rec | BERT4Rec | NextItNet
Build = Callable[..., Model]
SYSTEMS: dict[str, tuple[Build, dict[str, str]]] = {
    **{f"sasrec-{loss}": (_sasrec, {"loss": loss}) for loss in ("bce", "sampled_softmax", "full_softmax", "gbce")},
    **{f"gru4rec-{loss}": (_gru4rec, {"loss": loss}) for loss in ("full_softmax", "sampled_softmax", "bpr_max")},
    "bert4rec": (_bert4rec, {}),
    **{f"nextitnet-{block}": (_nextitnet, {"block": block}) for block in ("one_layer", "two_layer")},
}


@pytest.fixture(params=SYSTEMS)
def build(request: pytest.FixtureRequest) -> Build:
    make, settings = SYSTEMS[request.param]
    return lambda dropout=0.0: make(dropout=dropout, **settings)


def _batch(model: Model, length: int, rows: slice = slice(0, 4)) -> Any:
    """A training batch of these rows of the global batch, padded to `length`."""
    items, targets = ROWS[rows], TARGETS[rows]
    place = BatchRows(rows.start, rows.stop - rows.start, len(ROWS))
    user_B, target_BL = torch.arange(rows.start, rows.stop), padded(targets, length)
    if isinstance(model, BERT4Rec):
        masked = [[*row[:-1], MASK] for row in items]
        last_BL = padded([[0] * (len(row) - 1) + row[-1:] for row in items], length)
        inputs = ItemSequences(padded(masked, length), place)
        return MaskedTraining(user_B, inputs, last_BL, positions_with_loss(last_BL.numpy()))
    inputs, position_M = ItemSequences(padded(items, length), place), positions_with_loss(target_BL.numpy())
    if isinstance(model, GRU4Rec):
        negative_BK = user_B[:, None] + torch.tensor([[1, 5]])
        return SharedNegativeTraining(user_B, inputs, target_BL, negative_BK, position_M)
    return SequenceTraining(user_B, inputs, target_BL, ((target_BL + 3) % ITEMS + 1)[:, :, None], position_M)


def _gradients(model: Model, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total = model.loss(model(batch)).total
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_padding_changes_neither_values_nor_gradients(build: Build) -> None:
    model = build()
    loss, gradients = _gradients(model, _batch(model, 3))
    # Every loss, bpr_max included, must depend on all trained weights, or this test would prove little.
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "bias" not in name)
    padded_loss, padded_gradients = _gradients(model, _batch(model, LONGEST))
    torch.testing.assert_close(padded_loss, loss)
    assert gradients.keys() == padded_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_padding_changes_no_user_vector(build: Build) -> None:
    model = build().eval()
    alone = model.user_vectors(sequences([[2, 7, 3]], 3))
    for length in (4, LONGEST):
        torch.testing.assert_close(model.user_vectors(sequences([[2, 7, 3], [1]], length))[:1], alone)


def test_padding_stays_zero(build: Build) -> None:
    model = build()
    _, gradients = _gradients(model, _batch(model, LONGEST))
    table = "items.weight" if isinstance(model, SASRec) else "items.vectors.weight"
    assert not gradients[table][0].any()
    if not isinstance(model, SASRec):
        assert not gradients["items.bias.weight"][0].any()


def test_dropout_does_not_depend_on_how_a_batch_is_split(build: Build) -> None:
    model = build(dropout=0.5).train()
    torch.manual_seed(5)
    whole = model(_batch(model, 3)).loss_B
    for start, stop in [(0, 1), (1, 3), (3, 4)]:
        torch.manual_seed(5)
        torch.testing.assert_close(model(_batch(model, 3, slice(start, stop))).loss_B, whole[start:stop])
    assert not torch.allclose(model.eval()(_batch(model, 3)).loss_B, whole)


@pytest.mark.parametrize("name", ["sasrec-full_softmax", "gru4rec-full_softmax", "bert4rec", "nextitnet-two_layer"])
def test_the_training_score_is_the_inner_product_that_ranks(name: str) -> None:
    """The loss of a user's last position follows from user and item vectors alone."""
    make, settings = SYSTEMS[name]
    model = make(dropout=0.0, **settings)
    batch = _batch(model, 3, slice(1, 2))
    score_N = model.item_vectors(ItemIds(torch.arange(1, ITEMS + 1))) @ model.user_vectors(batch.input)[0]
    target = int(batch.target_BL[0, -1])
    torch.testing.assert_close(model(batch).loss_B[0], -score_N.log_softmax(0)[target - 1])


def _build(world: Path, **system: Any) -> AnySystem:
    config = parse_config({"output": "unused", "data": {"path": str(world)}, "system": system}, "test")
    return build_system(config, open_dataset(world, full_check=False))


@pytest.mark.parametrize("loss", ["bpr_max", "sampled_softmax"])
def test_more_negatives_than_a_user_leaves_are_refused(world: Path, loss: str) -> None:
    with pytest.raises(ConfigError, match=r"system\.negatives=40 needs 40 items .* lower it, or build"):
        _build(world, name="gru4rec", loss=loss, negatives=40)
    _build(world, name="gru4rec", loss=loss, negatives=10)


@pytest.mark.parametrize("name", ["gru4rec", "sasrec"])
def test_the_loss_over_the_catalog_needs_and_draws_no_negatives(world: Path, name: str) -> None:
    system = _build(world, name=name, loss="full_softmax", negatives=4000)
    users = next(read_in_order(world, open_dataset(world, full_check=False).manifest))
    batch = system.collator.train(users, slice(0, 5), 0)
    assert (batch.negative_BK if name == "gru4rec" else batch.negative_BLK).shape[-1] == 0
    assert torch.isfinite(system.model.loss(system.model.forward(batch)).total)
