"""The LLM recommenders, row by row: which parameters train, the contents of the prompts, Equation 1."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LLM_SYSTEMS, llm4rec_config
from llm_parts import retrieval_parts
from torch import Tensor

from trainer.config import parse_config
from trainer.data.collators.base import ItemIds
from trainer.data.collators.retrieval import RetrievalTraining, UserPrompts
from trainer.data.collators.targets import choose_targets
from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.models import AnySystem, build_system
from trainer.models.llm.retrieval import BatchTerms

every_system = pytest.mark.parametrize("name", LLM_SYSTEMS)


class Bench:
    """Builds systems on the small world."""

    def __init__(self, world: Path, llm: Path, teacher: Path, stage1: Path) -> None:
        self.runs = {"teacher": teacher, "stage1": stage1}
        self.llm = llm
        self.dataset: Dataset = open_dataset(world, full_check=False)
        self.users: Users = next(read_in_order(world, self.dataset.manifest)).take(slice(0, 6))

    def build(self, name: str, *, max_tokens: int = 256, **system: Any) -> AnySystem:
        tree = llm4rec_config(name, self.dataset.path, Path("unused"), self.llm, self.runs)
        tree["system"] |= system
        tree["system"]["llm"] = tree["system"]["llm"] | {"max_tokens": max_tokens}
        return build_system(parse_config(tree, "test"), self.dataset)

    def batch(self, built: AnySystem, share: slice = slice(0, 6)) -> RetrievalTraining:
        return retrieval_parts(built)[1].train(self.users, share, 0)


@pytest.fixture(scope="module")
def bench(world: Path, tiny_llm: Path, teacher: Path, stage1: Path) -> Bench:
    return Bench(world, tiny_llm, teacher, stage1)


def _layers(*names: str) -> set[str]:
    return {f"{name}.{layer}.{kind}" for name in names for layer in (0, 1, 3) for kind in ("weight", "bias")}


def _adapters(*modules: str) -> set[str]:
    paths = {"q_proj", "k_proj", "v_proj", "o_proj"}
    full = [f"{'self_attn' if module in paths else 'mlp'}.{module}" for module in modules]
    layers = [f"reader.llm.decoder.layers.{layer}.{module}" for layer in range(3) for module in full]
    return {f"{layer}.lora_{factor}.default.weight" for layer in layers for factor in "AB"}


ALWAYS = _layers("user_head", "item_head") | {"user_out.vector", "item_out.vector"}
ATTENTION, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINED = {
    "tallrec": _adapters(*ATTENTION),
    "llara": _adapters(*ALL) | _layers("reader.item_projector"),
    "collm": _adapters(*ATTENTION) | _layers("reader.item_projector", "reader.user_projector"),
    "a_llmrec": _layers("reader.item_projector.1", "reader.user_projector"),
    "llm_srec": _layers("reader.item_projector", "distillation.teacher_head"),
}


@every_system
def test_what_trains(bench: Bench, name: str) -> None:
    """A step changes exactly the row's parts, not the LLM, the teacher or the stage-1 encoder."""
    built = bench.build(name)
    model, _ = retrieval_parts(built)
    model.train()
    batch = bench.batch(built)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == ALWAYS | TRAINED[name]
    before = {key: p.clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):  # one factor of an adapter starts at zero, so the first step changes only that factor
        optimizer.zero_grad()
        model.loss(model(batch)).total.backward()
        optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == trained


@every_system
def test_what_it_is_built_on(bench: Bench, name: str) -> None:
    keys = {"tallrec": set(), "a_llmrec": {"teacher", "stage1"}}.get(name, {"teacher"})
    assert bench.build(name).built_on.keys() == keys


@every_system
def test_the_loss_is_equation_1(bench: Bench, name: str) -> None:
    built = bench.build(name)
    model, _ = retrieval_parts(built)
    model.eval()
    with torch.no_grad():
        terms = model(bench.batch(built))
        losses = model.loss(terms)
    scores = terms.score_BWC[:, 0].double().numpy()
    by_hand = np.mean([-math.log(math.exp(s[0]) / sum(math.exp(x) for x in s)) for s in scores])
    assert float(losses.parts["retrieval"]) == pytest.approx(by_hand, rel=1e-5)
    if name != "llm_srec":
        assert float(losses.total) == float(losses.parts["retrieval"])
        assert losses.parts.keys() == {"retrieval"}


@every_system
def test_scores_are_inner_products_of_the_vectors_used_for_ranking(bench: Bench, name: str) -> None:
    built = bench.build(name)
    model, collator = retrieval_parts(built)
    model.eval()
    with torch.no_grad():
        terms = model(bench.batch(built))
        history = bench.users.train.without_last()
        user_BD = model.user_vectors(collator.histories(history))
        item_ND = model.item_vectors(collator.items(np.arange(1, bench.dataset.num_items + 1)))
    target_score_B = (user_BD * item_ND[bench.users.train.last_item_U() - 1]).sum(1)
    torch.testing.assert_close(terms.score_BWC[:, 0, 0], target_score_B, rtol=1e-4, atol=1e-5)


@every_system
def test_shares_of_a_batch_give_the_terms_of_the_whole(bench: Bench, name: str) -> None:
    """A rank's terms, including dropout, do not depend on the users of other ranks."""
    dropout: dict[str, Any] = {} if name in ("a_llmrec", "llm_srec") else {"lora": {"dropout": 0.3}}
    built = bench.build(name, **dropout)
    model, _ = retrieval_parts(built)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad and float(parameter.detach().abs().max()) == 0.0 and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)  # adapters start at zero, where their dropout has no effect

    def terms(share: slice, seed: int = 3) -> list[Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            return [term for term in model(bench.batch(built, share)) if isinstance(term, Tensor)]

    whole = terms(slice(0, 6))
    parts = [terms(slice(0, 1)), terms(slice(1, 4)), terms(slice(4, 4)), terms(slice(4, 6))]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), column, rtol=1e-4, atol=1e-5)
    assert torch.equal(terms(slice(0, 6), seed=4)[1], whole[1]) == (not dropout)


@pytest.mark.parametrize(("name", "options"), [("collm", {}), ("a_llmrec", {}), ("llm_srec", {"user_vector": True})])
def test_the_users_vector_comes_first_and_depends_on_the_sequence(
    bench: Bench, name: str, options: dict[str, Any]
) -> None:
    model, collator = retrieval_parts(bench.build(name, **options))
    model.eval()
    history = bench.users.train.without_last()
    prompt = collator.writer.user_prompt(history.item_E[:3], history.time_E[:3])
    first, *items, last = prompt.item_S.tolist()
    assert (first, last) == (USER_SLOT, READOUT_SLOT)
    assert items == history.item_E[3 - len(items) : 3].tolist()
    batch = collator.histories(history)
    assert batch.sequence is not None
    other_BL = batch.sequence.item_BL.clone()
    other_BL[2, -1] = other_BL[2, -1] % bench.dataset.num_items + 1
    other = replace(batch, sequence=replace(batch.sequence, item_BL=other_BL))
    with torch.no_grad():
        moved_B = (model.user_vectors(batch) - model.user_vectors(other)).abs().amax(1) > 1e-6
    assert moved_B.tolist() == [user == 2 for user in range(len(history))]
    shuffled = collator.histories(history.last(5).shuffled(0)).sequence
    assert shuffled is not None
    padded = history.last(5).shuffled(0).padded(shuffled.item_BL.shape[1])
    assert shuffled.item_BL.tolist() == padded.tolist()


def test_llaras_curriculum_begins_with_tallrecs_prompts(bench: Bench) -> None:
    """Everything else, including the candidates, stays the same."""
    plain, built, text = bench.build("llara"), bench.build("llara", curriculum_steps=4), bench.build("tallrec")
    assert plain.curriculum is None
    assert built.curriculum is not None
    easy, hard, alone = (
        collator.train(bench.users, slice(0, 6), 0)
        for collator in (built.curriculum.easy, built.collator, text.collator)
    )
    assert torch.equal(easy.prompts.trained.token_T, alone.prompts.trained.token_T)
    assert not (easy.prompts.slot_item_S > 0).any()
    assert torch.equal(hard.prompts.trained.token_T, bench.batch(plain).prompts.trained.token_T)
    assert torch.equal(easy.candidate_YC, hard.candidate_YC)
    fixed_prefix = {
        name for name, _ in built.model.named_parameters() if name.startswith(built.curriculum.fixed_prefix)
    }
    assert fixed_prefix == _layers("reader.item_projector")
    model, _ = retrieval_parts(built)
    model.train()
    model.loss(model(easy)).total.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name in fixed_prefix]
    assert all(grad is not None and not grad.any() for grad in gradients), "zero, but not None: ranks wait for it"


def test_collms_official_projector_is_one_mlp_for_users_and_items(bench: Bench) -> None:
    model, collator = retrieval_parts(bench.build("collm", projectors="shared"))
    model.eval()
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    mlp = {f"reader.item_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert trained == ALWAYS | _adapters(*ATTENTION) | mlp
    weights = {key: p.detach().double() for key, p in model.named_parameters() if key in mlp}
    assert weights["reader.item_projector.0.weight"].shape == (160, 16)
    assert weights["reader.item_projector.2.weight"].shape == (32, 160)
    batch = collator.histories(bench.users.train)
    assert model.reader.teacher is not None
    with torch.no_grad():
        teacher_BD = model.reader.user_vectors(batch.sequence)
        assert teacher_BD is not None
        slots_SD = model.reader._slot_vectors(batch.prompts, teacher_BD, torch.zeros(6, 32))
        table_ND = model.reader.teacher.item_vectors(ItemIds(torch.arange(1, 41)))
    for number, item in enumerate(batch.prompts.slot_item_S.tolist()):
        if item == READOUT_SLOT:
            continue
        user = int(batch.prompts.slot_prompt_S[number])
        vector = (teacher_BD[user] if item == USER_SLOT else table_ND[item - 1]).double()
        hidden = weights["reader.item_projector.0.weight"] @ vector + weights["reader.item_projector.0.bias"]
        expected = weights["reader.item_projector.2.weight"] @ hidden.clamp(min=0)
        torch.testing.assert_close(
            slots_SD[number].double(), expected + weights["reader.item_projector.2.bias"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["tallrec", "llara", "llm_srec"])
def test_without_a_users_vector_the_sequence_is_not_used(bench: Bench, name: str) -> None:
    _, collator = retrieval_parts(bench.build(name))
    batch = collator.histories(bench.users.train.without_last())
    assert not (batch.prompts.slot_item_S == USER_SLOT).any()
    if name == "tallrec":
        assert (batch.prompts.slot_item_S == READOUT_SLOT).all()
        assert batch.sequence is None


def test_every_row_supports_standardized_readouts(bench: Bench) -> None:
    for name in LLM_SYSTEMS:
        built = bench.build(name, readout_init="standardized")
        assert built.initialize is not None
        built.initialize(torch.device("cpu"))
        model, collator = retrieval_parts(built)
        model.eval()
        with torch.no_grad():
            user_BD = model.user_vectors(collator.histories(bench.users.train))
        cosine_BB = torch.nn.functional.normalize(user_BD, dim=-1) @ torch.nn.functional.normalize(user_BD, dim=-1).T
        assert float(cosine_BB.mean()) < 0.6, name


WITH_ITEM_VECTORS = [name for name in LLM_SYSTEMS if name != "tallrec"]


@pytest.mark.parametrize("name", WITH_ITEM_VECTORS)
def test_projectors_at_the_scale_of_tokens(bench: Bench, name: str) -> None:
    """Injected vectors start with the standard deviation of the LLM's token embeddings."""
    model, _ = retrieval_parts(bench.build(name, projector_init="token_scale"))
    plain, _ = retrieval_parts(bench.build(name))
    token_std = float(model.reader.llm.token_table().std())
    teacher = model.reader.teacher
    assert teacher is not None
    with torch.no_grad():
        row_Md = teacher.item_vectors(ItemIds(torch.arange(1, 41)))
        f_items = [some.reader.item_projector for some in (model, plain)]
        scaled, as_before = (projector(row_Md).std() for projector in f_items if projector is not None)
    assert float(scaled) == pytest.approx(token_std, rel=1e-3)
    assert float(as_before) > 3 * token_std


@pytest.mark.parametrize("name", WITH_ITEM_VECTORS)
def test_older_items_reach_the_user_vector(bench: Bench, name: str) -> None:
    """An item far behind the titled ones changes the user vector, and where it stands counts."""
    history = next(read_in_order(bench.dataset.path, bench.dataset.manifest)).train.last(9)
    history = history.take(np.flatnonzero(history.length_U == 9)[:3])
    assert len(history) == 3
    reordered = replace(history, item_E=history.item_E.reshape(3, 9)[:, [6, 5, 4, 3, 2, 1, 0, 7, 8]].flatten())
    plain, extended = (
        retrieval_parts(bench.build(name, max_history=2, max_vector_items=n, max_tokens=512)) for n in (0, 7)
    )
    for (model, collator), reaches in ((plain, False), (extended, True)):
        model.eval()
        # The teacher's user vector, which CoLLM and A-LLMRec inject, is that of the same sequences in both.
        sequence = collator.histories(history).sequence
        with torch.no_grad():
            before, after = (
                model.user_vectors(UserPrompts(collator.histories(some).prompts, sequence))
                for some in (history, reordered)
            )
        assert torch.equal(before, after) != reaches


def test_llaras_easy_prompts_have_no_bare_vectors(bench: Bench) -> None:
    built = bench.build("llara", curriculum_steps=4, max_history=2, max_vector_items=5)
    assert built.curriculum is not None
    easy, hard = (
        collator.train(bench.users, slice(0, 6), 0).prompts for collator in (built.curriculum.easy, built.collator)
    )
    assert not (easy.slot_item_S > 0).any()
    assert (hard.slot_item_S > 0).sum() > (hard.readout_R >= 0).sum() + 2 * 6


@pytest.mark.parametrize("name", WITH_ITEM_VECTORS)
def test_items_of_the_batch_train_every_system(bench: Bench, name: str) -> None:
    """The loss by hand, from vectors of items encoded alone; it reaches every trained parameter."""
    model, collator = retrieval_parts(bench.build(name, train_candidates="batch", targets="window"))
    model.eval()
    users = bench.users.train
    terms = model(collator.train(bench.users, slice(0, 6), 0))
    assert isinstance(terms, BatchTerms)
    found = model.loss(terms)
    found.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    targets = choose_targets(users, "window", max_history=5, address=(0, 0))
    item_M = collator._items_of_batch(users, targets, 0)
    with torch.no_grad():
        score_YM = terms.student_BWD[terms.real_BW > 0] @ model.item_vectors(collator.items(item_M)).T
    score_YM -= terms.log_q_BX.flatten()[: len(item_M)]
    expected = []
    for score_M, row, target in zip(score_YM, targets.row_Y, targets.items(users), strict=True):
        own = set(users.take(slice(row, row + 1)).item_E.tolist()) - {int(target)}
        kept = [place for place, item in enumerate(item_M) if item not in own]
        expected.append(float(score_M[kept].logsumexp(0) - score_M[item_M.tolist().index(target)]))
    assert float(found.parts["retrieval"]) == pytest.approx(np.mean(expected), rel=1e-5)
