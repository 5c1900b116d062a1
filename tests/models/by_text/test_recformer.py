"""RECFORMER: embeddings and losses by hand, the two stages of fine-tuning, and refused configurations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_encoder, run_command, text_config, write_config
from safetensors.numpy import load_file
from torch import Tensor

from trainer.config import ConfigError, parse_config
from trainer.data.collators.sentences import SentenceCollator, SentenceTraining
from trainer.data.item_sentences import NOT_MASKED
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.models import AnySystem, build_system
from trainer.models.by_text.recformer import PretrainTerms, Recformer, RecformerPretrain
from trainer.runs.folder import RunFolder
from trainer.runs.requirements import check_requirements

LIMITS = {"max_items": 6, "max_tokens": 64}


def _tree(world: Path, encoder: Path, output: Path = Path("unused"), **system: Any) -> dict[str, Any]:
    section = {"name": "recformer", "encoder": {"path": str(encoder)}, **LIMITS}
    return text_config(world, output, section | system)


def _build(world: Path, encoder: Path, **system: Any) -> AnySystem:
    tree = _tree(world, encoder, **system)
    return build_system(parse_config(tree, "test"), open_dataset(world, full_check=False))


def _users(world: Path) -> Users:
    return next(read_in_order(world, open_dataset(world, full_check=False).manifest)).take(slice(0, 6))


def _parts(built: AnySystem) -> tuple[Recformer, SentenceCollator[SentenceTraining]]:
    """Model and collator of a fine-tuning stage."""
    assert isinstance(built.model, Recformer)
    assert isinstance(built.collator, SentenceCollator)
    return built.model, built.collator


def _fill(built: AnySystem) -> None:
    """Fill the item table as at the start of an epoch."""
    assert built.epoch_items is not None
    built.model.eval()
    with torch.no_grad():
        built.epoch_items.keep(built.epoch_items.vectors(np.arange(1, 41), torch.device("cpu")))


@pytest.mark.parametrize("family", ["bert", "roberta", "longformer"])
def test_four_embeddings_and_a_norm(tmp_path: Path, world: Path, family: str) -> None:
    model, collator = _parts(_build(world, build_encoder(tmp_path / family, family=family)))
    model.eval()
    batch = collator.histories(_users(world).train)
    embeddings: Any = model.sentence.encoder.encoder.embeddings
    found: list[Tensor] = []
    embeddings.dropout.register_forward_hook(lambda _module, inputs, _output: found.append(inputs[0]))
    with torch.no_grad():
        model.sentence(batch)
        row, place = 1, 5
        position = place if family == "bert" else place + 1  # all but BERT's start after the padding index
        total = (
            embeddings.word_embeddings.weight[batch.token_BT[row, place]]
            + embeddings.position_embeddings.weight[position]
            + embeddings.token_type_embeddings.weight[0]  # constant: RECFORMER's own token types are added on top
            + model.sentence.types.weight[batch.type_BT[row, place]]
            + model.sentence.places.weight[batch.place_BT[row, place]]
        )
        expected = (total - total.mean()) / (total.var(unbiased=False) + embeddings.LayerNorm.eps).sqrt()
    torch.testing.assert_close(found[-1][row, place], expected, rtol=1e-4, atol=1e-5)


def test_only_the_start_token_of_a_longformer_is_global(tmp_path: Path, world: Path) -> None:
    model, collator = _parts(_build(world, build_encoder(tmp_path / "longformer", family="longformer")))
    seen: list[Any] = []
    encoder = model.sentence.encoder.encoder
    assert set(encoder.config.attention_window) == {64}
    encoder.register_forward_pre_hook(lambda _module, _args, named: seen.append(named), with_kwargs=True)
    model.user_vectors(collator.histories(_users(world).train))
    mask_BT = seen[-1]["global_attention_mask"]
    assert (mask_BT[:, 0] == 1).all()
    assert mask_BT[:, 1:].sum() == 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_and_other_users_change_nothing(world: Path, tiny_encoder: Path, pooling: str) -> None:
    model, collator = _parts(_build(world, tiny_encoder, pooling=pooling))
    model.eval()
    train = _users(world).train
    with torch.no_grad():
        together = model.user_vectors(collator.histories(train))
        for user in range(6):
            alone = model.user_vectors(collator.histories(train.take(np.array([user]))))
            torch.testing.assert_close(alone[0], together[user], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_which_hidden_state_is_the_vector(world: Path, tiny_encoder: Path, pooling: str) -> None:
    model, collator = _parts(_build(world, tiny_encoder, pooling=pooling))
    model.eval()
    batch = collator.histories(_users(world).train)
    with torch.no_grad():
        hidden_BTD, vector_BD = model.sentence(batch), model.user_vectors(batch)
    for user, real_T in enumerate(batch.real_BT):
        state_D = hidden_BTD[user, 0] if pooling == "cls" else hidden_BTD[user, real_T].mean(0)
        torch.testing.assert_close(vector_BD[user], state_D / state_D.norm(), rtol=1e-4, atol=1e-6)


def test_indistinguishable_items_are_warned_about(
    world: Path, tiny_encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two layers of MiniLM give every item nearly the same start token, and training then makes no progress."""
    built = _build(world, tiny_encoder)
    assert built.epoch_items is not None
    vector_ND = torch.nn.functional.normalize(torch.randn(40, 32), dim=-1)
    built.epoch_items.keep(vector_ND)
    assert not caplog.records
    alike_ND = torch.nn.functional.normalize(vector_ND[:1] + 0.005 * torch.randn(40, 32), dim=-1)
    built.epoch_items.keep(alike_ND)
    assert "set system.pooling=mean, or start from system.pretrained" in caplog.text
    assert torch.equal(_parts(built)[0].table.value, alike_ND)


def test_fine_tuning_by_hand(world: Path, tiny_encoder: Path) -> None:
    built = _build(world, tiny_encoder)
    _fill(built)
    model, collator = _parts(built)
    batch = collator.train(_users(world), slice(0, 6), 0)
    with torch.no_grad():
        user_BD, items_ND = model.user_vectors(batch.histories).double(), model.table.value.double()
        expected = []
        for user, target in enumerate(batch.target_B.tolist()):
            exponentials = [math.exp(float(user_BD[user] @ item) / 0.05) for item in items_ND]
            expected.append(-math.log(exponentials[target - 1] / sum(exponentials)))
        terms = model(batch)
    assert terms.loss_B.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert float(model.loss(terms).total) == pytest.approx(float(np.mean(expected)), rel=1e-3)
    np.testing.assert_allclose(items_ND.norm(dim=1), 1.0, atol=1e-5)


def test_every_target_has_an_item_before_it(world: Path, tiny_encoder: Path) -> None:
    collator = _build(world, tiny_encoder).collator
    batches = [collator.train(_users(world), slice(0, 6), epoch) for epoch in range(40)]
    assert all((batch.histories.place_BT.amax(1) > 0).all() for batch in batches)
    assert len({tuple(batch.target_B.tolist()) for batch in batches}) > 30, "each epoch draws new targets"


def test_sampled_items_exclude_those_of_the_user(world: Path, tiny_encoder: Path) -> None:
    built = _build(world, tiny_encoder, negatives=4)
    _fill(built)
    model, collator = _parts(built)
    users = _users(world)
    batch = collator.train(users, slice(0, 6), 0)
    assert batch.negative_BK is not None
    with torch.no_grad():
        user_BD, terms = model.user_vectors(batch.histories), model(batch)
        for user in range(6):
            own = users.train.item_E[users.train.offset_U1[user] : users.train.offset_U1[user + 1]]
            assert not set(batch.negative_BK[user].tolist()) & set(own.tolist())
            candidates = [int(batch.target_B[user]), *batch.negative_BK[user].tolist()]
            scores = [float(user_BD[user] @ model.table.value[item - 1]) / 0.05 for item in candidates]
            expected = -math.log(math.exp(scores[0]) / sum(map(math.exp, scores)))
            assert float(terms.loss_B[user]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_loss_of_pre_training_by_hand(world: Path, tiny_encoder: Path) -> None:
    built = _build(world, tiny_encoder, name="recformer_pretrain", mask_share=0.4, mlm_weight=0.3)
    model = built.model.eval()
    assert isinstance(model, RecformerPretrain)
    batch = built.collator.train(_users(world), slice(0, 6), 0)
    with torch.no_grad():
        terms: PretrainTerms = model(batch)
        words = []
        hidden = model.sentence(batch.masked_histories.sentences)
        for user, place in (batch.masked_histories.label_BT != NOT_MASKED).nonzero().tolist():
            logits = model.sentence.encoder.words().weight @ model.head(hidden[user, place]) + model.word_bias
            words.append(-float(logits.log_softmax(0)[batch.masked_histories.label_BT[user, place]]))
        contrast = []
        for user in range(6):
            scores = [math.exp(float(terms.history_BD[user] @ item) / 0.05) for item in terms.item_BD]
            contrast.append(-math.log(scores[user] / sum(scores)))
        losses = model.loss(terms)
    assert float(terms.history_count_B.sum()) == len(words) > 5
    assert float(losses.parts["history_words"]) == pytest.approx(np.mean(words), rel=1e-4)
    assert float(losses.parts["contrast"]) == pytest.approx(np.mean(contrast), rel=1e-4)
    parts = {name: float(part) for name, part in losses.parts.items()}
    expected = parts["contrast"] + 0.3 * (parts["history_words"] + parts["item_words"])
    assert float(losses.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("system", [{"name": "recformer_pretrain"}, {}, {"negatives": 3}])
def test_terms_do_not_depend_on_the_split(world: Path, tiny_encoder: Path, system: dict[str, Any]) -> None:
    built = _build(world, tiny_encoder, dropout=0.3, **system)
    if built.epoch_items:
        _fill(built)
    built.model.train()

    def terms(share: slice) -> list[Tensor]:
        torch.manual_seed(2)
        return [term.detach() for term in built.model.forward(built.collator.train(_users(world), share, 3))]

    parts = [terms(share) for share in (slice(0, 1), slice(1, 1), slice(1, 6))]
    for whole, *split in zip(terms(slice(0, 6)), *parts, strict=True):
        torch.testing.assert_close(torch.cat(split), whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("freeze", [True, False])
def test_what_receives_a_gradient(world: Path, tiny_encoder: Path, freeze: bool) -> None:
    built = _build(world, tiny_encoder, freeze_words=freeze)
    _fill(built)
    model, collator = _parts(built)
    model.train()
    model.loss(model(collator.train(_users(world), slice(0, 6), 0))).total.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == ({"sentence.encoder.encoder.embeddings.word_embeddings.weight"} if freeze else set())


def _train(folder: Path, name: str, tree: dict[str, Any]) -> dict[str, np.ndarray]:
    done = run_command("launchers/train.py", write_config(folder / f"{name}.yaml", tree))
    assert done.returncode == 0, done.stderr
    return load_file(RunFolder(folder / name).best().weights)


@pytest.mark.process
def test_pre_training_then_both_stages(world: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    def tree(run: str, **system: Any) -> dict[str, Any]:
        return _tree(world, tiny_encoder, tmp_path / run, **system)

    _train(tmp_path, "pretrain", tree("pretrain", name="recformer_pretrain"))
    dataset = open_dataset(world, full_check=False)
    first = tree("first", pretrained=str(tmp_path / "pretrain"))
    pretrained = load_file(RunFolder(tmp_path / "pretrain").best().weights)
    start = build_system(parse_config(first, "test"), dataset).model.state_dict()
    for name in ("sentence.places.weight", "sentence.encoder.encoder.encoder.layer.0.attention.self.query.weight"):
        np.testing.assert_array_equal(start[name].numpy(), pretrained[name])
    stage1 = _train(tmp_path, "first", first)
    second = tree("second", stage=2, stage1=str(tmp_path / "first"))
    stage2 = _train(tmp_path, "second", second)
    assert np.array_equal(stage2["table.value"], stage1["table.value"]), "stage 2 keeps the table of stage 1"
    assert not np.array_equal(stage2["sentence.places.weight"], stage1["sentence.places.weight"])

    def refused(system: dict[str, Any]) -> str:
        with pytest.raises(ValueError) as caught:
            check_requirements(parse_config(tree("third", **system), "test"), dataset.manifest)
        return str(caught.value)

    run = str(tmp_path / "second")
    assert "is a run of stage 2: give the run of stage 1" in refused({"stage": 2, "stage1": run})
    assert "is a recformer run, not a recformer_pretrain run" in refused({"pretrained": run})
    pretrain = str(tmp_path / "pretrain")
    assert "has max_items=6: set system.max_items=6" in refused({"pretrained": pretrain, "max_items": 7})
    assert "has pooling=cls: set system.pooling=cls" in refused({"pretrained": pretrain, "pooling": "mean"})
    other = tree("third", pretrained=pretrain)
    other["system"]["encoder"]["layers"] = 1
    with pytest.raises(ValueError, match=r"pretrained=.* was trained with a different encoder"):
        build_system(parse_config(other, "test"), dataset)


def test_refusals(world: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    def refused(**system: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            parse_config(_tree(world, tiny_encoder, **system), "test")
        return str(caught.value)

    assert "set system.stage1 to the folder of that run" in refused(stage=2)
    assert "set system.stage=2, or leave it out" in refused(stage1="runs/a")
    assert "leave out system.pretrained" in refused(stage=2, stage1="runs/a", pretrained="runs/b")
    with pytest.raises(ValueError, match=r"max_tokens=512, but .* reads at most 128 tokens: lower it"):
        _build(world, tiny_encoder, max_tokens=512)
    with pytest.raises(ValueError, match=r"system\.negatives=40 needs 40 items"):
        _build(world, tiny_encoder, negatives=40)
