"""A-LLMRec's stage 1: losses by hand, which parameters train, and what stage 2 loads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import llm4rec_config, run_command, text_config, write_config
from torch import Tensor, nn

from trainer.config import parse_config
from trainer.data.collators.item_texts import ItemPairs
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import AnySystem, build_system
from trainer.models.by_id.build import load_teacher
from trainer.models.by_text.a_llmrec_stage1 import ALLMRecStage1
from trainer.models.by_text.build import load_stage1
from trainer.nn.pretrained import LLMError
from trainer.runs.folder import CheckpointError
from trainer.runs.requirements import check_requirements, find_sources


def _tree(world: Path, teacher: Path, encoder: Path, output: Path = Path("unused"), **system: Any) -> dict[str, Any]:
    section = {"name": "a_llmrec_stage1", "teacher": str(teacher), "encoder": {"path": str(encoder)}, "latent_dim": 12}
    return text_config(world, output, section | {"max_tokens": 32} | system, epochs=3)


def _build(world: Path, teacher: Path, encoder: Path, **system: Any) -> tuple[AnySystem, ALLMRecStage1]:
    config = parse_config(_tree(world, teacher, encoder, **system), "test")
    built = build_system(config, open_dataset(world, full_check=False))
    assert isinstance(built.model, ALLMRecStage1)
    return built, built.model


def _batch(built: AnySystem, world: Path, share: slice = slice(0, 6)) -> ItemPairs:
    users = next(read_in_order(world, open_dataset(world, full_check=False).manifest)).take(slice(0, 6))
    batch: ItemPairs = built.collator.train(users, share, 0)
    return batch


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _by_hand(model: ALLMRecStage1, user: Tensor, item: Tensor, text: Tensor) -> list[list[float]]:
    """The published computation, one user and one item at a time: recommendation, matching, item and text error."""
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}

    def code(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        latent = 1 / (
            1 + np.exp(-(weights[f"{kind}_coder.encode.0.weight"] @ x + weights[f"{kind}_coder.encode.0.bias"]))
        )
        return latent, weights[f"{kind}_coder.decode.weight"] @ latent + weights[f"{kind}_coder.decode.bias"]

    rows = []
    for u in range(len(user)):
        row = [0.0] * 4
        for side in (0, 1):
            x, t = item[2 * u + side].double().numpy(), text[2 * u + side].double().numpy()
            (x_latent, x_decoded), (t_latent, t_decoded) = code("item", x), code("text", t)
            probability = _sigmoid(float(np.mean(user[u].double().numpy() * x_decoded)))
            row[0] += -math.log(probability if side == 0 else 1 - probability)
            row[1] += float(np.mean((x_latent - t_latent) ** 2))
            row[2] += float(np.mean((x_decoded - x) ** 2))
            row[3] += float(np.mean((t_decoded - t) ** 2))
        rows.append(row)
    return rows


def test_the_loss_by_hand(world: Path, teacher: Path, tiny_encoder: Path) -> None:
    built, model = _build(world, teacher, tiny_encoder)
    model.eval()
    batch = _batch(built, world)
    with torch.no_grad():
        user, item = model.teacher.user_vectors(batch.sequence), model.teacher.items(batch.item_P)
        expected = np.array(_by_hand(model, user, item, model.texts(batch.texts)))
        terms = model(batch)
    np.testing.assert_allclose(torch.stack(list(terms), 1).numpy(), expected, rtol=1e-4, atol=1e-6)
    losses = model.loss(terms)
    recommendation, matching, items, texts = expected.mean(0)
    assert float(losses.total) == pytest.approx(recommendation + matching + 0.5 * items + 0.2 * texts, rel=1e-5)
    assert float(losses.parts["matching"]) == pytest.approx(matching, rel=1e-4)


def test_pairs_are_the_last_item_and_a_negative_that_the_user_does_not_have(
    world: Path, teacher: Path, tiny_encoder: Path
) -> None:
    built, _ = _build(world, teacher, tiny_encoder)
    batch = _batch(built, world)
    users = next(read_in_order(world, open_dataset(world, full_check=False).manifest)).take(slice(0, 6)).train
    assert batch.item_P[0::2].tolist() == users.last_item_U().tolist()
    for row, negative in enumerate(batch.item_P[1::2].tolist()):
        assert negative not in users.item_E[users.offset_U1[row] : users.offset_U1[row + 1]]
    assert batch.sequence.item_BL[:, -1].tolist() == users.without_last().last_item_U().tolist()


def test_terms_do_not_depend_on_how_a_batch_is_split(world: Path, teacher: Path, tiny_encoder: Path) -> None:
    built, model = _build(world, teacher, tiny_encoder, dropout=0.3)
    model.train()

    def terms(share: slice) -> list[Tensor]:
        torch.manual_seed(7)
        return [term.detach() for term in model(_batch(built, world, share))]

    parts = [terms(share) for share in (slice(0, 2), slice(2, 2), slice(2, 6))]
    for whole, *split in zip(terms(slice(0, 6)), *parts, strict=True):
        torch.testing.assert_close(torch.cat(split), whole, rtol=1e-4, atol=1e-6)


def test_what_receives_a_gradient(world: Path, teacher: Path, tiny_encoder: Path) -> None:
    built, model = _build(world, teacher, tiny_encoder)
    model.loss(model(_batch(built, world))).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("teacher.")), name


def test_the_text_target_sends_no_gradient_to_the_encoder(world: Path, teacher: Path, tiny_encoder: Path) -> None:
    built, model = _build(world, teacher, tiny_encoder)
    with torch.no_grad():  # a text autoencoder that ignores its input
        first = model.text_coder.encode[0]
        assert isinstance(first, nn.Linear)
        first.weight.zero_()
    model(_batch(built, world)).text_B.sum().backward()
    gradients = [p.grad for p in model.texts.parameters() if p.grad is not None]
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients)


def test_kept_vectors_equal_those_of_the_encoder(world: Path, teacher: Path, tiny_encoder: Path) -> None:
    built, model = _build(world, teacher, tiny_encoder)
    kept_built, kept = _build(world, teacher, tiny_encoder, train_encoder=False)
    assert kept_built.initialize is not None
    kept_built.initialize(torch.device("cpu"))
    batch = _batch(built, world)
    with torch.no_grad():
        torch.testing.assert_close(kept.texts(batch.item_P), model.eval().texts(batch.texts), rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("texts.") for name, _ in kept.named_parameters())


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory, world: Path, teacher: Path, tiny_encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    tree = _tree(world, teacher, tiny_encoder, folder / "run", train_encoder=False)
    done = run_command("launchers/train.py", write_config(folder / "stage1.yaml", tree))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.process
def test_a_run_learns_and_its_kept_vectors_are_in_the_checkpoint(stage1: Path) -> None:
    lines = [json.loads(line) for line in (stage1 / "metrics.jsonl").read_text().splitlines()]
    matching = [line["train/matching"] for line in lines if "train/matching" in line]
    assert matching[-1] < 0.8 * matching[0]
    done = run_command("launchers/evaluate.py", stage1, "--json", "--split", "valid")
    assert done.returncode == 0, done.stderr
    validated = max(line["valid/NDCG@10"] for line in lines if "valid/NDCG@10" in line)
    assert json.loads(done.stdout)["metrics"]["NDCG@10"]["value"] == pytest.approx(validated, abs=1e-6)


@pytest.mark.process
def test_stage_2_gets_the_frozen_item_encoder(stage1: Path, world: Path, teacher: Path) -> None:
    manifest = open_dataset(world, full_check=False).manifest
    runs = {"teacher": teacher, "stage1": stage1}
    config = parse_config(llm4rec_config("a_llmrec", world, Path("unused"), Path("unused"), runs), "test")
    sources = find_sources(config, manifest)
    assert sources.teacher is not None
    assert sources.a_llmrec_stage1 is not None
    sasrec = load_teacher(sources.teacher, manifest.num_items)
    encoder = load_stage1(sources.a_llmrec_stage1, sources.teacher)
    assert len(sources.a_llmrec_stage1.checkpoint.weights_sha256) == 64
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    latent = encoder(sasrec.items(torch.tensor([1, 2])))
    assert latent.shape == (2, 12)
    assert 0.0 < float(latent.min()) <= float(latent.max()) < 1.0
    another = replace(sources.teacher, checkpoint=sources.a_llmrec_stage1.checkpoint)
    with pytest.raises(CheckpointError, match=r"stage1=.* trained on a different teacher .*set system\.teacher="):
        load_stage1(sources.a_llmrec_stage1, another)


def test_refusals(world: Path, teacher: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    manifest = open_dataset(world, full_check=False).manifest

    def refused(teacher: Path = teacher, encoder: Path = tiny_encoder) -> str:
        with pytest.raises(ValueError) as caught:
            check_requirements(parse_config(_tree(world, teacher, encoder), "test"), manifest)
        return str(caught.value)

    assert "is not a run folder: train one with" in refused(teacher=tmp_path / "none")
    assert "is not a text encoder: there is no such folder; set system.encoder.path" in refused(
        encoder=tmp_path / "none"
    )
    with pytest.raises(LLMError, match=r"system\.max_tokens=200, but .* reads at most 128 tokens: lower it"):
        _build(world, teacher, tiny_encoder, max_tokens=200)
