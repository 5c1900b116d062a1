"""Title generation: loss and scores by hand, branches against whole prompts, greedy answers, trained parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import llm4rec_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from trainer.config import EvaluationConfig, parse_config
from trainer.data.collators.generation import TitleCollator
from trainer.data.prompts.prompt import Prompt
from trainer.data.raw.items import normalized
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.protocol import GREEDY_METRICS, Evaluator
from trainer.evaluation.rankers import TitleRanker
from trainer.evaluation.titles import judge_greedy, merge_same_titles
from trainer.models import AnySystem, build_system
from trainer.models.llm.generation import AnswerTerms, TitleGenerator
from trainer.nn.pretrained import in_dtype

SYSTEMS = ("tallrec", "llara", "collm", "a_llmrec")
every_system = pytest.mark.parametrize("name", SYSTEMS)
CPU = torch.device("cpu")


class Bench:
    """Builds systems on the small world."""

    def __init__(self, world: Path, llm: Path, teacher: Path, stage1: Path) -> None:
        self.runs = {"teacher": teacher, "stage1": stage1}
        self.llm = llm
        self.dataset: Dataset = open_dataset(world, full_check=False)
        self.users: Users = next(read_in_order(world, self.dataset.manifest)).take(slice(0, 6))
        self.history, self.target_B = self.users.targets("test")
        negative_BC = self.dataset.candidates("title", "test")[self.history.user_U]
        self.item_BC = np.concatenate([self.target_B[:, None], negative_BC], axis=1)

    def build(self, name: str, **system: Any) -> AnySystem:
        tree = llm4rec_config(name, self.dataset.path, Path("unused"), self.llm, self.runs, metric="HR@1")
        tree["system"] |= {"llm": tree["system"]["llm"] | {"max_tokens": 512}} | system
        return build_system(parse_config(tree | {"task": "generation"}, "test"), self.dataset)

    def parts(self, name: str, **system: Any) -> tuple[TitleGenerator, TitleCollator]:
        built = self.build(name, **system)
        assert isinstance(built.model, TitleGenerator)
        assert isinstance(built.collator, TitleCollator)
        return built.model, built.collator


@pytest.fixture(scope="module")
def bench(world: Path, tiny_llm: Path, teacher: Path, stage1: Path) -> Bench:
    return Bench(world, tiny_llm, teacher, stage1)


def _logits(model: TitleGenerator, collator: TitleCollator, bench: Bench, row: int, answer: list[int]) -> Tensor:
    """(k, V) logits of an answer's k tokens, from its own unbranched prompt through the causal LM."""
    one = slice(row, row + 1)
    history = bench.history.take(one)
    [question] = collator._questions(history, bench.item_BC[one], (collator.seed,))
    said = np.concatenate([question.token_T, answer[:-1]]).astype(np.int64)
    asked = len(question.token_T) - 1 + np.arange(len(answer))
    prompt = Prompt(said, question.slot_S, question.item_S, asked)
    sequence = collator.teacher.histories(history) if collator.teacher else None
    nothing = torch.zeros(0, model.reader.llm.dim)
    hidden = model.reader(collator.pack([prompt]), model.reader.user_vectors(sequence), nothing)
    causal = AutoModelForCausalLM.from_pretrained(bench.llm, **in_dtype("float32"))
    logits: Tensor = causal.get_output_embeddings()(hidden)
    return logits


@every_system
def test_a_score_equals_that_of_the_candidates_own_prompt(bench: Bench, name: str) -> None:
    """Sharing the prefix and branching change nothing, in either packing."""
    for packing in ("stream", "rows"):
        llm = {"path": str(bench.llm), "dtype": "float32", "max_tokens": 512, "packing": packing}
        model, collator = bench.parts(name, llm=llm)
        model.eval()
        with torch.no_grad():
            score_BC = model.title_scores(collator.choices(bench.history, bench.item_BC))
            for row, column in ((0, 0), (0, 3), (2, 1), (5, 5)):
                answer = collator.writer.answer(int(bench.item_BC[row, column]))
                logit_kV = _logits(model, collator, bench, row, answer)
                by_hand = np.mean([float(logit_kV[k].log_softmax(0)[token]) for k, token in enumerate(answer)])
                assert float(score_BC[row, column]) == pytest.approx(by_hand, abs=1e-5)


@every_system
def test_the_loss_is_cross_entropy_of_the_answer_alone(bench: Bench, name: str) -> None:
    model, collator = bench.parts(name)
    model.eval()
    batch = collator.train(bench.users, slice(0, 6), 0)
    with torch.no_grad():
        terms = model(batch)
    targets = bench.users.train.last_item_U()
    lengths = [len(collator.writer.answer(int(item))) for item in targets]
    assert terms.count_B.tolist() == lengths
    assert batch.answers.token_A.tolist() == [t for item in targets for t in collator.writer.answer(int(item))]
    loss = model.loss(AnswerTerms(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 6.0])))
    assert float(loss.total) == 1.0, "a mean over tokens, not over users"


def test_the_loss_is_that_of_the_score(bench: Bench) -> None:
    """Training and evaluation read the same positions: the answer's loss is minus its summed log-likelihood."""
    model, collator = bench.parts("llara")
    model.eval()
    batch = collator.train(bench.users, slice(0, 6), 0)
    history = bench.users.train.without_last()
    negative_free = np.stack([bench.users.train.last_item_U()] * 1, axis=1)
    with torch.no_grad():
        loss_B = model(batch).loss_B
        # The same prompt in both: the target is the only candidate.
        lone = TitleCollator(collator.writer, collator.teacher, 40, 5, 0, True, collator.pack, collator.seed)
        score_B1 = model.title_scores(lone.choices(history, negative_free))
        terms = model(lone.train(bench.users, slice(0, 6), 0))
    torch.testing.assert_close(terms.loss_B / terms.count_B, -score_B1[:, 0], rtol=1e-4, atol=1e-5)
    assert (loss_B - terms.loss_B).abs().max() > 1e-3, "different candidates in the prompt change the score"


@every_system
def test_what_trains(bench: Bench, name: str) -> None:
    model, collator = bench.parts(name)
    batch = collator.train(bench.users, slice(0, 6), 0)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    kinds = {key.split(".")[1] if "lora" not in key else "lora" for key in trained}
    expected = {"tallrec": {"lora"}, "llara": {"lora", "item_projector"}}
    assert kinds == expected.get(name, {"item_projector", "user_projector"} | ({"lora"} if name == "collm" else set()))
    before = {key: p.clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(model.train()(batch)).total.backward()
        optimizer.step()
    assert {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} == trained


@every_system
def test_shares_of_a_batch_give_the_terms_of_the_whole(bench: Bench, name: str) -> None:
    model, collator = bench.parts(name)
    model.train()

    def terms(share: slice) -> list[Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            return list(model(collator.train(bench.users, share, 0)))

    whole = terms(slice(0, 6))
    parts = [terms(slice(0, 1)), terms(slice(1, 4)), terms(slice(4, 4)), terms(slice(4, 6))]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), column, rtol=1e-4, atol=1e-5)


def test_candidates_of_training(bench: Bench) -> None:
    """The target and as many negatives as are stored for evaluation, in an order drawn per user and epoch."""
    _, collator = bench.parts("llara")
    indices = []
    for epoch in range(8):
        batch = collator.train(bench.users, slice(0, 6), epoch)
        for user, target in enumerate(bench.users.train.last_item_U().tolist()):
            own = set(bench.users.train.take(slice(user, user + 1)).item_E.tolist())
            slots = batch.prompts.slot_item_S[batch.prompts.slot_prompt_S == user].tolist()
            listed = slots[-6:]
            assert target in listed
            assert len(set(listed)) == 6
            assert own & set(listed) == {target}
            indices.append(listed.index(target))
    assert set(indices) == set(range(6)), "the target's position must vary"


def _reference_greedy(model: TitleGenerator, collator: TitleCollator, bench: Bench, row: int) -> list[int]:
    one = slice(row, row + 1)
    said: list[int] = []
    while len(said) < collator.writer.longest_answer and collator.writer.end_token not in said:
        batch = collator.questions(bench.history.take(one), bench.item_BC[one], [said])
        said.append(int(model.next_tokens(batch)))
    return said


@torch.no_grad()
def test_greedy_answers(bench: Bench) -> None:
    """A model trained to write given titles is judged exactly as by plain greedy decoding, token by token."""
    model, collator = bench.parts("llara", lora={"rank": 8, "dropout": 0.0})
    batch = collator.choices(bench.history, bench.item_BC)
    with torch.enable_grad():
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        right = batch.answers.answer_A % 6 == 0
        few = batch.answers.answer_A // 6 < 3
        for _ in range(80):
            optimizer.zero_grad()
            likelihood_A, _ = model._log_likelihood(model._read(batch), batch.answers)
            (-likelihood_A[right & few].mean()).backward()
            optimizer.step()
    model.eval()
    greedy_BC = model.compare(batch).greedy_BC
    right_B, valid_B = judge_greedy(model, collator, bench.history, bench.item_BC, greedy_BC, CPU)
    titles = [
        [normalized(collator.writer.text(collator.writer.answer(int(i))[:-1])) for i in row] for row in bench.item_BC
    ]
    for row in range(6):
        said = _reference_greedy(model, collator, bench, row)
        text = normalized(collator.writer.text([t for t in said if t != collator.writer.end_token]))
        assert (right_B[row], valid_B[row]) == (text == titles[row][0], text in titles[row])
        assert greedy_BC[row].tolist() == [said == collator.writer.answer(int(item)) for item in bench.item_BC[row]]
    assert right_B[:3].all(), "the first three users must be answered, or this test proves little"
    assert (right_B <= valid_B).all()


def test_titles_are_compared_without_case_quotes_and_spaces() -> None:
    assert normalized(' "The  Ring" ') == normalized("the ring")
    assert normalized('The "Ring"') != normalized("The Ring")


def test_a_candidate_with_the_targets_title_counts_as_the_target() -> None:
    score = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 0.0]])
    titles = ["", "a", "b", "a", "c"]
    merged = merge_same_titles(score, np.array([[1, 2, 3], [4, 2, 3]]), titles)
    assert merged.tolist() == [[3.0, 2.0, float("-inf")], [1.0, 2.0, 0.0]]


@every_system
def test_the_evaluator_ranks_titles(bench: Bench, name: str) -> None:
    built = bench.build(name)
    built.model.eval()
    settings = EvaluationConfig(batch_size=4, users=12)
    evaluator = Evaluator(bench.dataset, built.scoring, settings, World(0, 1, CPU), "generation")
    ranking = evaluator.at_current_weights(decode=True)
    assert isinstance(ranking.ranker, TitleRanker)
    model, collator = ranking.ranker.scoring.model, ranking.ranker.scoring.collator
    assert (model, collator) == (built.model, built.collator)
    found = ranking.evaluate("test")
    assert set(found.ranks.candidates) == {6}
    assert found.tokens > 0
    with torch.no_grad():
        score_BC = model.title_scores(collator.choices(bench.history, bench.item_BC))
    by_hand_B = (score_BC[:, 1:] > score_BC[:, :1]).sum(1).tolist()
    chosen = ranking.evaluator.sampled_users(["test"])
    assert chosen is not None
    assert all(found.ranks.greater[place] == by_hand_B[user] for place, user in enumerate(chosen) if user < 6)
    means = found.means(EvaluationConfig())
    assert set(GREEDY_METRICS) <= means.keys()
    assert not set(GREEDY_METRICS) & evaluator.validate().keys()
    undecoded = evaluator.at_current_weights()
    together = undecoded.evaluate_together(["valid", "test"])["test"]
    assert together.ranks.greater.tolist() == found.ranks.greater.tolist()
    shuffled = undecoded.evaluate("test", "shuffled")
    assert len(shuffled.ranks) == len(found.ranks)


def test_a_head_of_its_own_is_loaded(tmp_path: Path) -> None:
    from helpers import build_llm

    from trainer.config import LLMConfig
    from trainer.nn.llm.backbone import load_llm
    from trainer.nn.llm.lm_head import load_lm_head

    config = LLMConfig(path=str(build_llm(tmp_path)), dtype="float32", layers=1)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path, **in_dtype("float32"))
    tied = bool(causal.config.tie_word_embeddings)
    llm = load_llm(config)
    head = load_lm_head(config, llm)
    assert torch.equal(head.weight, causal.get_output_embeddings().weight)
    assert torch.equal(head.weight, llm.token_table()) == tied
    causal.config.tie_word_embeddings = not tied
    causal.config.save_pretrained(tmp_path)
    assert torch.equal(load_lm_head(config, llm).weight, llm.token_table()) == (not tied)
