"""CTRL: item vectors initialised from text, the alignment loss by hand, and training from an alignment run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_command, text_config, write_config
from safetensors.numpy import load_file
from torch import Tensor

from trainer.config import parse_config
from trainer.data.collators.base import ItemIds
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import AnySystem, build_system
from trainer.models.by_id.sasrec import SASRec
from trainer.models.by_text.ctrl import CTRLAlign, fine_grained_contrast, principal_axes, start_from_text
from trainer.runs.folder import RunFolder
from trainer.runs.requirements import check_requirements

BACKBONE = {"name": "sasrec", "dim": 16, "max_length": 12, "dropout": 0.2}


def _tree(world: Path, encoder: Path, output: Path = Path("unused"), **system: Any) -> dict[str, Any]:
    section = {"name": "ctrl", "encoder": {"path": str(encoder)}, "backbone": BACKBONE}
    return text_config(world, output, section | system, epochs=3)


def _build(world: Path, encoder: Path, **system: Any) -> AnySystem:
    built = build_system(parse_config(_tree(world, encoder, **system), "test"), open_dataset(world, full_check=False))
    if built.initialize:
        built.initialize(torch.device("cpu"))
    return built


def _sasrec(built: AnySystem) -> SASRec:
    """The SASRec that CTRL trains."""
    assert isinstance(built.model, SASRec)
    return built.model


def _vectors() -> Tensor:
    """Anisotropic vectors, as language models produce: one direction common to all, and unequal spread."""
    generator = torch.Generator().manual_seed(0)
    return 50.0 + torch.randn(40, 12, generator=generator) * torch.logspace(0, -2, 12)


def test_principal_axes_against_numpy() -> None:
    vectors = _vectors()
    centred, axes = principal_axes(vectors, 5, whiten=False)
    plain = vectors.double().numpy() - vectors.double().numpy().mean(0)
    _, values, rows = np.linalg.svd(plain, full_matrices=False)
    np.testing.assert_allclose(np.abs(axes.numpy()), np.abs(rows[:5].T), atol=1e-8)
    whitened = (centred @ principal_axes(vectors, 5, whiten=True)[1]).numpy()
    np.testing.assert_allclose(whitened.T @ whitened / 40, np.eye(5), atol=1e-8)
    assert values[0] > 5 * values[4]


def test_equal_titles_give_a_finite_initialisation() -> None:
    same = _vectors()[:1].repeat(40, 1)
    same[0] += 1.0
    _, axes = principal_axes(same, 5, whiten=True)
    assert torch.isfinite(axes).all()


@pytest.mark.parametrize("whiten", [True, False])
def test_both_adapters_start_from_the_same_vectors(world: Path, tiny_encoder: Path, whiten: bool) -> None:
    table, linear = (
        _sasrec(_build(world, tiny_encoder, adapter=adapter, whiten=whiten)) for adapter in ("pca", "linear")
    )
    items = ItemIds(torch.arange(41))
    with torch.no_grad():
        first, second = table.item_vectors(items), linear.item_vectors(items)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    assert first[0].abs().sum() == 0
    assert float(first[1:].std()) == pytest.approx(math.sqrt(2 / (41 + 16)), rel=1e-2)
    cosine = torch.nn.functional.normalize(first[1:], dim=-1)
    assert float((cosine @ cosine.T - torch.eye(40)).abs().mean()) < 0.4, "items must not start with equal vectors"
    trained = {name for name, parameter in linear.named_parameters() if name.startswith("items.")}
    assert trained == {"items.adapter.weight"}


def test_the_contrast_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.nn.functional.normalize(torch.randn(3, 2, 4, generator=generator), dim=-1) for _ in range(2))
    temperature = 0.5

    def similarity(a: Tensor, b: Tensor) -> float:
        return sum(max(float(a[m] @ b[n]) for n in range(2)) for m in range(2)) / temperature

    for u, found in enumerate(fine_grained_contrast(x, y, temperature).tolist()):
        there = [math.exp(similarity(x[u], y[v])) for v in range(3)]
        back = [math.exp(similarity(y[u], x[v])) for v in range(3)]
        expected = -0.5 * (math.log(there[u] / sum(there)) + math.log(back[u] / sum(back)))
        assert found == pytest.approx(expected, rel=1e-5)


def test_terms_of_the_alignment_do_not_depend_on_the_split(world: Path, tiny_encoder: Path) -> None:
    built = _build(world, tiny_encoder, name="ctrl_align")
    users = next(read_in_order(world, open_dataset(world, full_check=False).manifest)).take(slice(0, 6))
    built.model.train()

    def terms(share: slice) -> list[Tensor]:
        torch.manual_seed(2)
        return [term.detach() for term in built.model.forward(built.collator.train(users, share, 3))]

    parts = [terms(share) for share in (slice(0, 1), slice(1, 1), slice(1, 6))]
    for whole, *split in zip(terms(slice(0, 6)), *parts, strict=True):
        torch.testing.assert_close(torch.cat(split), whole, rtol=1e-4, atol=1e-5)


def test_the_alignment_trains_the_backbone_and_not_the_encoder(world: Path, tiny_encoder: Path) -> None:
    built = _build(world, tiny_encoder, name="ctrl_align")
    model = built.model
    assert isinstance(model, CTRLAlign)
    users = next(read_in_order(world, open_dataset(world, full_check=False).manifest)).take(slice(0, 6))
    model.loss(model(built.collator.train(users, slice(0, 6), 0))).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("reader.")), name


def _train(folder: Path, name: str, tree: dict[str, Any]) -> list[dict[str, float]]:
    done = run_command("launchers/train.py", write_config(folder / f"{name}.yaml", tree))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.process
def test_align_then_train_then_evaluate(world: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    align = _tree(world, tiny_encoder, tmp_path / "align", name="ctrl_align", adapter="linear")
    align["train"] |= {"epochs": 6, "lr": 3e-3}
    losses = [line["train/loss"] for line in _train(tmp_path, "align", align) if "train/loss" in line]
    assert np.mean(losses[-7:]) < np.mean(losses[:7]) - 0.3
    ctrl = _tree(world, tiny_encoder, tmp_path / "ctrl", adapter="linear", aligned=str(tmp_path / "align"))
    manifest = open_dataset(world, full_check=False).manifest
    config = parse_config(ctrl, "test")
    started = build_system(config, open_dataset(world, full_check=False)).model.state_dict()
    for name, value in load_file(RunFolder(tmp_path / "align").best().weights).items():
        if name.startswith("backbone."):
            np.testing.assert_array_equal(started[name.removeprefix("backbone.")].numpy(), value)
    _train(tmp_path, "ctrl", ctrl)
    carried = load_file(RunFolder(tmp_path / "ctrl").best().weights)
    assert carried["items.text.value"].shape == (41, 32)
    again = run_command("launchers/evaluate.py", tmp_path / "ctrl", "--json")
    assert again.returncode == 0, again.stderr
    other = parse_config(ctrl | {"system": ctrl["system"] | {"adapter": "pca"}}, "test")
    with pytest.raises(ValueError, match=r"aligned=.* has a different adapter: set system\.adapter as in"):
        check_requirements(other, manifest)
    short = ctrl["system"] | {"encoder": {"path": str(tiny_encoder), "layers": 1}}
    with pytest.raises(ValueError, match=r"aligned=.* was trained with a different encoder"):
        build_system(parse_config(ctrl | {"system": short}, "test"), open_dataset(world, full_check=False))


def test_refusals(world: Path, tiny_encoder: Path) -> None:
    with pytest.raises(ValueError, match=r"system\.backbone\.dim=33, but .* at most 32 components: set it to 32"):
        _build(world, tiny_encoder, backbone=BACKBONE | {"dim": 33})
    with pytest.raises(ValueError, match=r"reads at most 128 tokens"):
        _build(world, tiny_encoder, name="ctrl_align", max_tokens=64, max_history=50)


def test_start_leaves_padding_alone(world: Path, tiny_encoder: Path) -> None:
    model = _sasrec(_build(world, tiny_encoder))
    start_from_text(model, _vectors().repeat(1, 2), whiten=True)
    assert model.items.weight[0].abs().sum() == 0
