"""The plain training step that benchmarks compare with computes the same loss and gradients as ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llm_srec_config
from llm_parts import retrieval_parts

from benchmarks.common.plain import PlainLLMSRec, PlainPrompts
from trainer.config import LLMConfig, LLMSRecConfig, parse_config
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.models import build_system
from trainer.models.llm.retrieval import DistilledTerms, LLM4Rec, RetrievalTerms


@dataclass(frozen=True)
class Built:
    """LLM-SRec on the small world, with some of its users."""

    model: LLM4Rec
    collator: RetrievalCollator
    dataset: Dataset
    users: Users
    llm: LLMConfig


def _build(world: Path, teacher: Path, tiny_llm: Path, **system: Any) -> Built:
    tree = llm_srec_config(world, Path("unused"), teacher, tiny_llm)
    tree["system"] |= system
    tree["system"]["llm"]["max_tokens"] = 1024  # as in the published code: nothing is truncated
    config = parse_config(tree, "test")
    assert isinstance(config.system, LLMSRecConfig)
    dataset = open_dataset(world, full_check=False)
    users = next(read_in_order(world, dataset.manifest)).take(slice(0, 10))
    return Built(*retrieval_parts(build_system(config, dataset)), dataset, users, config.system.llm)


def _gradients(model: LLM4Rec, terms: RetrievalTerms | DistilledTerms) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = model.loss(terms).total
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("policy", ["exclude_user", "official"])
def test_plain_and_ours_give_the_same_loss_and_gradients(
    world: Path, teacher: Path, tiny_llm: Path, recompute: bool, policy: str
) -> None:
    built = _build(world, teacher, tiny_llm, negative_policy=policy)
    model, users = built.model.train(), built.users
    plain = PlainLLMSRec(model, built.collator, built.llm, built.dataset.titles, recompute=recompute)
    loss, ours = _gradients(model, model(built.collator.train(users, slice(0, len(users)), 3)))
    plain_loss, theirs = _gradients(model, plain.terms(users, 3))
    assert plain_loss == pytest.approx(loss, rel=1e-5)
    assert ours.keys() == theirs.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    largest = max(float(gradient.abs().max()) for gradient in ours.values())
    for name, gradient in ours.items():
        # The bias of f_item shifts all scores equally, so its exact gradient is 0 and any difference is rounding.
        close = 1e-4 * float(gradient.abs().max()) + 1e-5 * largest
        torch.testing.assert_close(theirs[name], gradient, rtol=0.0, atol=close, msg=partial("{}: {}".format, name))
    # Control: a different epoch draws different negatives, so the loss differs.
    assert _gradients(model, plain.terms(users, 4))[0] != pytest.approx(loss, rel=1e-4)


def test_useful_tokens_are_those_of_our_prompts(world: Path, teacher: Path, tiny_llm: Path) -> None:
    built = _build(world, teacher, tiny_llm)
    users = built.users
    prompts = PlainPrompts(built.collator, built.llm, built.dataset.titles)
    lengths = prompts.useful_lengths(users, 0)
    batch = built.collator.train(users, slice(0, len(users)), 0)
    assert sum(lengths) == batch.prompts.useful_tokens
    assert len(lengths) == len(users) + int(batch.candidate_YC.max()) + 1
    assert prompts.of_users(prompts.shown(users)).numel() > sum(lengths[: len(users)]), "there must be padding to skip"
