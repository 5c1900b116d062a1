"""Several targets per user in one step (Appendix E.3): one prompt with branches equals one prompt per target."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers import llm_srec_config
from llm_parts import retrieval_parts

from trainer.config import parse_config
from trainer.data.collators.retrieval import RetrievalCollator, UserPrompts, events_of
from trainer.data.collators.targets import TargetKind, choose_targets
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.models import build_system
from trainer.models.llm.retrieval import LLM4Rec

EPOCH = 3


def _built(
    world: Path, teacher: Path, llm: Path, targets: TargetKind, *, max_tokens: int = 1024, **system: Any
) -> tuple[LLM4Rec, RetrievalCollator]:
    tree = llm_srec_config(world, Path("/nowhere"), teacher, llm)
    tree["system"] |= {"targets": targets, "max_history": 4, **system}
    tree["system"]["llm"] = tree["system"]["llm"] | {"max_tokens": max_tokens}
    return retrieval_parts(build_system(parse_config(tree, "test"), open_dataset(world, full_check=False)))


def _users(world: Path) -> Users:
    return next(read_in_order(world, open_dataset(world, full_check=False).manifest)).take(slice(0, 6))


@pytest.mark.parametrize("targets", get_args(TargetKind))
@pytest.mark.parametrize(
    ("user_vector", "max_vector_items"), [(False, 0), (True, 0), ("end", 0), (False, 5), (True, 5), ("end", 5)]
)
def test_each_target_equals_a_prompt_of_its_own(
    world: Path, teacher: Path, tiny_llm: Path, targets: TargetKind, user_vector: bool | str, max_vector_items: int
) -> None:
    """Values and gradients of all trained parameters against one ordinary user prompt per target."""
    model, collator = _built(
        world, teacher, tiny_llm, targets, user_vector=user_vector, max_vector_items=max_vector_items
    )
    model.train()
    users = _users(world)
    chosen = choose_targets(users.train, targets, max_history=4, max_vector_items=max_vector_items, address=(0, EPOCH))
    assert bool(chosen.vectors_Y.any()) == (max_vector_items > 0)
    terms = model(collator.train(users, slice(0, 6), EPOCH))
    together_TD = terms.student_BWD[terms.real_BW > 0]

    rows = zip(events_of(chosen.shown(users.train)), chosen.vectors_Y, strict=True)
    prompts = collator.pack([collator.writer.user_prompt(*events, int(vectors)) for events, vectors in rows])
    # The teacher reads all that precedes a target, of which the prompt shows the latest items.
    whole = collator.histories(chosen.before(users.train))
    alone_TD = model.user_vectors(UserPrompts(prompts, whole.sequence))
    torch.testing.assert_close(together_TD, alone_TD, rtol=1e-5, atol=1e-5)

    weight = torch.randn(alone_TD.shape, generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]
    together, alone = (
        torch.autograd.grad((x * weight).sum(), trained, materialize_grads=True) for x in (together_TD, alone_TD)
    )
    for mine, its in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5 * float(its.abs().max()) + 1e-7)


def test_where_prompts_do_not_fit_no_target_is_shown(world: Path, teacher: Path, tiny_llm: Path) -> None:
    """With room for two or three items, long histories drop the oldest; items from the target on are never shown."""
    model, collator = _built(world, teacher, tiny_llm, "window", max_tokens=180)
    users = _users(world)
    chosen = choose_targets(users.train, "window", max_history=4, address=(0, EPOCH))
    shown = chosen.shown(users.train)
    alone = collator.histories(shown).prompts
    targets = len(chosen)
    items = [
        [int(item) for item, prompt in zip(alone.slot_item_S, alone.slot_prompt_S, strict=True) if prompt == t][:-1]
        for t in range(targets)
    ]
    assert min(map(len, items)) >= 1
    assert any(len(found) < length for found, length in zip(items, shown.length_U, strict=True)), "every history fitted"
    with torch.no_grad():
        model.eval()
        terms = model(collator.train(users, slice(0, 6), EPOCH))
        alone_TD = model.user_vectors(collator.histories(shown))
    torch.testing.assert_close(terms.student_BWD[terms.real_BW > 0], alone_TD, rtol=1e-5, atol=1e-5)


def test_all_targets_cost_little_more_than_one(world: Path, teacher: Path, tiny_llm: Path) -> None:
    users = _users(world)
    tree, alone = (
        collator.train(users, slice(0, 6), EPOCH).prompts
        for _, collator in (_built(world, teacher, tiny_llm, "window", user_vector=flag) for flag in (False, True))
    )
    assert len(tree.readout_R) == len(alone.readout_R)
    assert tree.run_tokens < 0.75 * alone.run_tokens


def test_scores_and_teacher_belong_to_their_targets(world: Path, teacher: Path, tiny_llm: Path) -> None:
    model, collator = _built(world, teacher, tiny_llm, "all")
    model.eval()
    users = _users(world)
    chosen = choose_targets(users.train, "all", max_history=4, address=(0, EPOCH))
    with torch.no_grad():
        terms = model(collator.train(users, slice(0, 6), EPOCH))
        item_ND = model.item_vectors(collator.items(np.arange(1, 41)))
        sequence = collator.histories(chosen.before(users.train)).sequence
        assert model.distillation is not None
        teacher_TD = model.distillation(model.reader.user_vectors(sequence))
    real_BW = terms.real_BW > 0
    assert real_BW.sum(1).tolist() == (users.train.length_U - 1).tolist()
    expected_T = (terms.student_BWD[real_BW] * item_ND[chosen.items(users.train) - 1]).sum(1)
    torch.testing.assert_close(terms.score_BWC[real_BW][:, 0], expected_T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.teacher_BWD[real_BW], teacher_TD, rtol=1e-5, atol=1e-5)


def test_shares_give_the_terms_of_the_whole(world: Path, teacher: Path, tiny_llm: Path) -> None:
    model, collator = _built(world, teacher, tiny_llm, "window")
    model.eval()
    users = _users(world)
    with torch.no_grad():
        whole = model(collator.train(users, slice(0, 6), EPOCH))
        shares = (slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 6))
        parts = [model(collator.train(users, share, EPOCH)) for share in shares]
    assert whole.targets == int(whole.real_BW.sum())
    assert {part.targets for part in parts} == {whole.targets}  # a fact about the global batch
    for term, columns in zip(whole[:-1], zip(*(part[:-1] for part in parts), strict=True), strict=True):
        torch.testing.assert_close(torch.cat(columns), term, rtol=1e-5, atol=1e-5)
