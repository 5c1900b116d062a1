"""A teacher that knows titles: what its vectors hold, and that a student reads and learns from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import llm_srec_config
from llm_parts import retrieval_parts
from torch import nn
from torch.nn import functional as F

from trainer.config import ConfigError, LLMSRecConfig, SASRecConfig, parse_config
from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences
from trainer.data.reading.dataset import open_dataset
from trainer.models import build_system
from trainer.models.by_id.sasrec import SASRec
from trainer.models.llm.titled_teacher import COMPONENTS, TitledTeacher, TitleSpace, title_width

ITEMS, WIDTH, LATEST = 60, 12, 3


TOKENS_WE = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.fixture
def titles() -> list[list[int]]:
    generator = np.random.default_rng(2)
    return [generator.integers(0, 40, generator.integers(1, 6)).tolist() for _ in range(ITEMS)]


def _sasrec() -> SASRec:
    torch.manual_seed(0)
    return SASRec(SASRecConfig(name="sasrec", dim=8, max_length=6, heads=1), ITEMS).eval()


def _sequences(*histories: list[int]) -> ItemSequences:
    padded = torch.tensor([[0] * (6 - len(history)) + history for history in histories])
    return ItemSequences(padded, BatchRows(0, len(histories), len(histories)))


def test_titles_are_whitened_means_of_their_tokens(titles: list[list[int]]) -> None:
    vector_NK = TitleSpace(TOKENS_WE, titles).vectors(TOKENS_WE, titles)
    assert vector_NK.shape == (ITEMS, WIDTH)
    torch.testing.assert_close(vector_NK.norm(dim=1), torch.ones(ITEMS))
    # By hand: the same cosines as those of the left singular vectors of the centered means.
    mean_NE = torch.stack([TOKENS_WE[tokens].double().mean(0) for tokens in titles])
    left_NK = torch.linalg.svd(mean_NE - mean_NE.mean(0), full_matrices=False)[0]
    expected = F.normalize(left_NK, dim=1) @ F.normalize(left_NK, dim=1).T
    torch.testing.assert_close(vector_NK @ vector_NK.T, expected.float(), atol=1e-5, rtol=0)


def test_blocks_of_titles_change_nothing(titles: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TitleSpace(TOKENS_WE, titles).vectors(TOKENS_WE, titles)
    monkeypatch.setattr("trainer.models.llm.titled_teacher._BLOCK", 7)
    torch.testing.assert_close(TitleSpace(TOKENS_WE, titles).vectors(TOKENS_WE, titles), whole, atol=1e-5, rtol=0)


def test_directions_that_titles_do_not_have_stay_zero() -> None:
    titles = [[1], [2], [3], [1, 2]]
    vector_NK = TitleSpace(TOKENS_WE, titles).vectors(TOKENS_WE, [*titles, [], [1]])
    assert vector_NK.isfinite().all()
    assert int((vector_NK.abs().amax(0) > 1e-6).sum()) == 2, "three titles span two directions"
    torch.testing.assert_close(vector_NK[5], vector_NK[0])


@torch.no_grad()
def test_scores_are_those_of_sasrec_and_the_weighted_cosine_of_titles(
    titles: list[list[int]],
) -> None:
    sasrec, weight = _sasrec(), 0.5
    teacher = TitledTeacher(sasrec, TOKENS_WE, titles, weight=weight, latest=LATEST)
    assert teacher.dim == 8 + WIDTH
    batch, items = _sequences([1, 2, 3, 4, 5], [7]), ItemIds(torch.arange(1, ITEMS + 1))
    score = teacher.user_vectors(batch) @ teacher.item_vectors(items).T
    own = sasrec.user_vectors(batch) @ sasrec.item_vectors(items).T
    title_NK = TitleSpace(TOKENS_WE, titles).vectors(TOKENS_WE, titles)
    cosine = F.normalize(torch.stack([title_NK[2:5].sum(0), title_NK[6]]), dim=1) @ title_NK.T
    scale = (score - own) / cosine
    torch.testing.assert_close(scale, scale.mean().expand_as(scale), rtol=1e-3, atol=1e-3)

    alone = _sequences(*([item] for item in range(1, ITEMS + 1)))
    others = ~torch.eye(ITEMS, dtype=torch.bool)
    sas = (sasrec.user_vectors(alone) @ sasrec.item_vectors(items).T)[others].std()
    both = (teacher.user_vectors(alone) @ teacher.item_vectors(items).T)[others]
    titles_part = both - (sasrec.user_vectors(alone) @ sasrec.item_vectors(items).T)[others]
    assert float(titles_part.std() / sas) == pytest.approx(weight, rel=1e-3)


def test_titles_of_another_catalog_stay_in_the_space_of_the_first(
    titles: list[list[int]],
) -> None:
    teacher = TitledTeacher(_sasrec(), TOKENS_WE, titles, weight=1.0, latest=LATEST)
    before = teacher.title_NK.clone()
    teacher.replace_titles(TOKENS_WE, titles[::-1])
    torch.testing.assert_close(teacher.title_NK[1:], before[1:].flip(0))


def test_titles_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"system\.teacher_titles: the titles .* do not tell items apart: leave it out"
    ):
        TitledTeacher(_sasrec(), TOKENS_WE, [[3, 4]] * ITEMS, weight=1.0, latest=LATEST)


def test_a_student_is_built_around_the_wider_teacher(world: Path, teacher: Path, tiny_llm: Path) -> None:
    tree = llm_srec_config(world, Path("unused"), teacher, tiny_llm)
    tree["system"] |= {"teacher_titles": 0.5, "max_history": 4}
    config = parse_config(tree, "test")
    model, collator = retrieval_parts(build_system(config, open_dataset(world, full_check=False)))
    assert isinstance(config.system, LLMSRecConfig)
    titled = model.reader.teacher
    assert isinstance(titled, TitledTeacher)
    added = title_width(config.system, model.reader.llm.dim)
    assert added == min(COMPONENTS, model.reader.llm.dim)
    assert titled.dim == titled.sasrec.dim + added
    assert model.distillation is not None
    for module in (model.reader.item_projector, model.distillation.teacher_head):
        assert isinstance(module, nn.Sequential)
        assert isinstance(module[0], nn.Linear)
        assert module[0].in_features == titled.dim
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "teacher." in name]
    assert collator.teacher is not None
