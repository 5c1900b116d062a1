"""LLM-SRec: Equation 4 by hand, its options, and which parameters train."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import llm_srec_config
from llm_parts import retrieval_parts

from trainer.config import parse_config
from trainer.data.collators.retrieval import RetrievalTraining
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import AnySystem, build_system
from trainer.models.llm.retrieval import DistilledTerms, LLM4Rec


def _build(world: Path, teacher: Path, tiny_llm: Path, **system: Any) -> tuple[AnySystem, RetrievalTraining]:
    tree = llm_srec_config(world, Path("unused"), teacher, tiny_llm)
    tree["system"] |= system
    dataset = open_dataset(world, full_check=False)
    built = build_system(parse_config(tree, "test"), dataset)
    users = next(read_in_order(world, dataset.manifest)).take(slice(0, 6))
    return built, retrieval_parts(built)[1].train(users, slice(0, 6), 0)


def _terms() -> DistilledTerms:
    generator = torch.Generator().manual_seed(4)
    return DistilledTerms(
        torch.ones(3, 1),
        torch.randn(3, 1, 4, generator=generator),
        torch.randn(3, 1, 5, generator=generator),
        torch.randn(3, 1, 5, generator=generator),
        targets=3,
    )


def _equation_4(terms: DistilledTerms, normalize: bool) -> tuple[float, float, float]:
    """Retrieval, distillation and uniformity with plain loops over users."""
    scores, student, teacher = (t[:, 0].double().numpy() for t in terms[1:4])
    if normalize:
        student = np.array([v / math.sqrt(v @ v) for v in student])
        teacher = np.array([v / math.sqrt(v @ v) for v in teacher])
    users = range(len(scores))
    retrieval = np.mean([-math.log(math.exp(scores[u][0]) / sum(math.exp(s) for s in scores[u])) for u in users])
    distillation = np.mean([np.mean((student[u] - teacher[u]) ** 2) for u in users])
    pairs = list(itertools.combinations(users, 2))
    uniformity = sum(np.mean([math.exp(-2 * np.sum((x[a] - x[b]) ** 2)) for a, b in pairs]) for x in (student, teacher))
    return float(retrieval), float(distillation), float(uniformity)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_equation_4(world: Path, teacher: Path, tiny_llm: Path, normalize: bool) -> None:
    built, _ = _build(world, teacher, tiny_llm, distill_normalize=normalize, distill_weight=0.5, uniformity_weight=3.0)
    retrieval, distillation, uniformity = _equation_4(_terms(), normalize)
    losses = built.model.loss(_terms())
    assert float(losses.parts["retrieval"]) == pytest.approx(retrieval, rel=1e-5)
    assert float(losses.parts["distillation"]) == pytest.approx(distillation, rel=1e-5)
    assert float(losses.parts["uniformity"]) == pytest.approx(uniformity, rel=1e-5)
    assert float(losses.total) == pytest.approx(retrieval + 0.5 * distillation + 3.0 * uniformity, rel=1e-5)


def test_options_of_distillation(world: Path, teacher: Path, tiny_llm: Path) -> None:
    def distillation(**system: Any) -> float:
        built, _ = _build(world, teacher, tiny_llm, **system)
        return float(built.model.loss(_terms()).parts["distillation"])

    assert distillation(mse_reduction="sum") == pytest.approx(5 * distillation(), rel=1e-5)
    student, target = (torch.nn.functional.normalize(x[:, 0], dim=-1) for x in _terms()[2:4])
    logits = student @ target.T / 0.07
    by_hand = torch.stack([-logits[u].log_softmax(0)[u] for u in range(3)]).mean()
    assert distillation(distillation="contrastive") == pytest.approx(float(by_hand), rel=1e-5)


def test_one_user_has_no_uniformity_and_no_nan(world: Path, teacher: Path, tiny_llm: Path) -> None:
    built, _ = _build(world, teacher, tiny_llm)
    real_BW, *rest = (t[:1].requires_grad_() for t in _terms()[:4])
    losses = built.model.loss(DistilledTerms(real_BW, rest[0], rest[1], rest[2], targets=1))
    assert float(losses.parts["uniformity"]) == 0.0
    losses.total.backward()
    assert torch.isfinite(losses.total)


def test_scores_are_inner_products_of_the_vectors_used_for_ranking(world: Path, teacher: Path, tiny_llm: Path) -> None:
    """A candidate's score in training equals that of user_vectors and item_vectors in evaluation."""
    built, batch = _build(world, teacher, tiny_llm)
    model, collator = retrieval_parts(built)
    model.eval()
    with torch.no_grad():
        terms = model(batch)
        dataset = open_dataset(world, full_check=False)
        users = next(read_in_order(world, dataset.manifest)).take(slice(0, 6)).train
        user_BD = model.user_vectors(collator.histories(users.without_last()))
        item_ND = model.item_vectors(collator.items(np.arange(1, dataset.num_items + 1)))
    target_score_B = (user_BD * item_ND[users.last_item_U() - 1]).sum(1)
    torch.testing.assert_close(terms.score_BWC[:, 0, 0], target_score_B, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.student_BWD[:, 0], user_BD, rtol=1e-5, atol=1e-5)


def test_exactly_the_small_parts_train(world: Path, teacher: Path, tiny_llm: Path) -> None:
    built, batch = _build(world, teacher, tiny_llm)
    model, _ = retrieval_parts(built)
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = ("reader.item_projector", "user_head", "item_head", "distillation.teacher_head")
    layers = {f"{head}.{n}.{kind}" for head in heads for n in (0, 1, 3) for kind in ("weight", "bias")}
    assert trained == layers | {"user_out.vector", "item_out.vector"}

    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(model(batch)).total.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in trained), f"{name} {'moved' if moved else 'did not move'}"


def test_standardized_readouts_start_spread_out(world: Path, teacher: Path, tiny_llm: Path) -> None:
    """Same functions, different initialisation: hidden states have mean 0 and deviation 1, scores deviation 1."""
    built, _ = _build(world, teacher, tiny_llm, readout_init="standardized")
    plain, _ = _build(world, teacher, tiny_llm)
    dataset = open_dataset(world, full_check=False)
    users = next(read_in_order(world, dataset.manifest)).train.without_last()
    assert built.initialize is not None
    assert plain.initialize is None
    built.initialize(torch.device("cpu"))
    model, collator = retrieval_parts(built)
    model.eval()
    plain_model, _ = retrieval_parts(plain)
    with torch.no_grad():
        batch = collator.histories(users)
        hidden_BD = model.users_hidden(batch)
        first, old = model.user_head[0], plain_model.user_head[0]
        standardized = (hidden_BD - hidden_BD.mean(0)) / hidden_BD.std(0)
        torch.testing.assert_close(first(hidden_BD), old(standardized), rtol=1e-3, atol=1e-3)
        scores = model.user_vectors(batch) @ model.item_vectors(collator.items(np.arange(1, 41))).T
        assert float(scores.std()) == pytest.approx(1.0, abs=1e-3)
        cosine = torch.nn.functional.normalize(model.user_vectors(batch), dim=-1)
        assert float((cosine @ cosine.T).mean()) < 0.5
        collapsed = torch.nn.functional.normalize(plain_model.eval().user_vectors(batch), dim=-1)
        assert float((collapsed @ collapsed.T).mean()) > 0.9


def test_parameter_counts_of_the_3b_model() -> None:
    """22,797,056 trained parameters at d=64, d_llm=3072, d'=128."""
    from trainer.nn.projectors import LearnedToken, TokenScale, item_projector, readout_head, teacher_head

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    token = LearnedToken(TokenScale.of(torch.randn(10, 3072)))
    parts = [item_projector(64, 3072), readout_head(3072, 2048, 128), teacher_head(64, 128)]
    assert [count(part) for part in parts] == [9_646_080, 6_559_872, 25_088]
    assert count(parts[0]) + 2 * count(parts[1]) + count(parts[2]) + 2 * count(token) == 22_797_056


def test_the_teacher_is_in_evaluation_mode_unless_asked(world: Path, teacher: Path, tiny_llm: Path) -> None:
    quiet, batch = _build(world, teacher, tiny_llm)
    noisy, _ = _build(world, teacher, tiny_llm, teacher_dropout=True)

    def twice(model: LLM4Rec) -> bool:
        with torch.no_grad():
            return torch.equal(model.train()(batch).teacher_BWD, model.train()(batch).teacher_BWD)

    assert twice(retrieval_parts(quiet)[0])
    assert not twice(retrieval_parts(noisy)[0])
