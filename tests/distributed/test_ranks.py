"""Real DeepSpeed on one and two ranks: the same losses, samples and parameters at any stage.

All scenarios of one world size run in one process group, because starting it takes most of the time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import llm4rec_config, llm_srec_config, run_ranks, sasrec_config
from rank_worker import digests
from safetensors.numpy import load_file

from trainer.config import LLMConfig
from trainer.data.curriculum import Curriculum
from trainer.nn.llm.backbone import load_llm

WORKER = Path(__file__).with_name("rank_worker.py")
STEPS = 12  # 61 users in batches of 10: 7 steps per epoch, the last of one user
INTERRUPT = 9  # inside the second epoch, one step after the checkpoint of step 8
CURRICULUM = 10
WARM = 4
"""Steps of the runs that start from the run `one`."""


ID_SYSTEMS: dict[str, dict[str, Any]] = {
    "sasrec": {"name": "sasrec", "negatives": 2},
    "gru4rec": {"name": "gru4rec", "layers": 2, "hidden_dropout": 0.2, "loss": "bpr_max", "negatives": 5},
    "bert4rec": {"name": "bert4rec"},
    "nextitnet": {"name": "nextitnet", "dilations": [1, 2]},
}


@dataclass(frozen=True)
class Outcome:
    """Run folders and reports of the scenarios of all world sizes."""

    folder: Path
    reports: dict[str, dict[str, Any]]

    def tensors(self, name: str, file: str = "weights", step: int = STEPS) -> dict[str, np.ndarray]:
        return load_file(self.checkpoint(name, step) / f"{file}.safetensors")

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        return self.folder / name / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, world: Path, teacher: Path, tiny_llm: Path) -> Outcome:
    folder = tmp_path_factory.mktemp("ranks")
    reports: dict[str, dict[str, Any]] = {}

    def llm(name: str, zero: int = 1, micro: int | None = None, **more: Any) -> dict[str, Any]:
        train = {"max_steps": STEPS, "save_every": 2, "micro_batch_size": micro, "keep_checkpoints": 20}
        train |= more.pop("train", {})
        config = llm_srec_config(world, folder / name, teacher, tiny_llm, **train)
        config["engine"] |= {"deepspeed": f"zero{zero}"}
        return {"name": name, "config": config, **more}

    def titles(name: str, zero: int) -> dict[str, Any]:
        runs = {"teacher": teacher}
        config = llm4rec_config("llara", world, folder / name, tiny_llm, runs, max_steps=4, metric="HR@1")
        config["system"]["llm"]["max_tokens"] = 512
        config["engine"]["deepspeed"] = f"zero{zero}"
        return {"name": name, "config": config | {"task": "generation"}}

    def collm(name: str, zero: int) -> dict[str, Any]:
        config = llm4rec_config("collm", world, folder / name, tiny_llm, {"teacher": teacher}, max_steps=4)
        # Item vectors that start alike would leave gradients of pure rounding, which Adam amplifies.
        config["system"] |= {"lora": {"dropout": 0.3}, "readout_init": "standardized"}
        config["engine"]["deepspeed"] = f"zero{zero}"
        return {"name": name, "config": config}

    def llara(name: str, zero: int, **more: Any) -> dict[str, Any]:
        """LLaRA with its curriculum over the first steps; every step is saved."""
        train = {"max_steps": STEPS, "save_every": 1, "keep_checkpoints": 20}
        config = llm4rec_config("llara", world, folder / name, tiny_llm, {"teacher": teacher}, **train)
        config["system"] |= {"curriculum_steps": CURRICULUM, "readout_init": "standardized"}
        config["engine"]["deepspeed"] = f"zero{zero}"
        return {"name": name, "config": config, **more}

    def batch_items(name: str, zero: int, micro: int | None = None, **train: Any) -> dict[str, Any]:
        """LLM-SRec scored against all items of the global batch, with older items as bare vectors."""
        scenario = llm(name, zero, micro, train={"max_steps": STEPS} | train)
        more = {"train_candidates": "batch", "targets": "window", "max_history": 3, "max_vector_items": 4}
        # Standardized, as in `collm`: read-outs that start alike leave gradients of pure rounding.
        titled = {"teacher_titles": 0.5, "readout_init": "standardized"}
        scenario["config"]["system"] |= more | {"score_distill_weight": 0.5} | titled
        return scenario

    def by_id(name: str, system: dict[str, Any], zero: int = 1) -> dict[str, Any]:
        """An id-based system, with dropout."""
        config = sasrec_config(world, folder / name, max_steps=STEPS, save_every=100)
        config["system"] = {"dim": 16, "max_length": 12, "dropout": 0.3} | system
        config["engine"] |= {"deepspeed": f"zero{zero}"}
        return {"name": name, "config": config}

    def ids(ranks: str) -> list[dict[str, Any]]:
        return [by_id(f"{name}-{ranks}", system) for name, system in ID_SYSTEMS.items()]

    def go(ranks: int, label: str, scenarios: list[dict[str, Any]]) -> None:
        listing = folder / f"{label}.scenarios"
        listing.write_text(json.dumps(scenarios))
        run_ranks(ranks, WORKER, [str(listing), str(folder / f"{label}.report")], timeout=900)
        for rank in range(ranks):
            for result in json.loads((folder / f"{label}.{rank}.json").read_text()):
                reports[f"{result['name']}/{rank}"] = result

    first, warm = {"max_steps": 1}, {"max_steps": WARM, "init_from": str(folder / "one")}
    alone = [llm("one", 0), llm("one-first", 0, train=first), llm("one-micro", 1, 3)]
    alone += [llm("warm-one", 0, train=warm), collm("collm-one", 0), titles("titles-one", 0), llara("llara-one", 0)]
    alone += [batch_items("batch-one", 0), batch_items("batch-one-micro", 1, 3)]
    go(1, "one", alone + ids("one"))
    two = [llm("two-first", 2, train=first)]
    two += [llm(f"two-zero{stage}", stage) for stage in (0, 1, 2, 3)]
    two += [llm("warm-two", 2, train=warm), llm("warm-three", 3, train=warm)]
    two += [llm("warm-cut", 2, train=warm, interrupt=3), llm("warm-cut", 2, train=warm)]
    two += [collm("collm-two", 2), collm("collm-three", 3), titles("titles-three", 3)]
    two += [llara("llara-two", 2), llara("llara-three", 3)]
    two += [llara("llara-cut", 2, interrupt=INTERRUPT), llara("llara-cut", 2)]
    two += [batch_items("batch-two", 2), batch_items("batch-two-micro", 1, 2), batch_items("batch-three", 3)]
    two += [llm("two-micro", 2, 2), *ids("two"), by_id("gru4rec-zero3", ID_SYSTEMS["gru4rec"], zero=3)]
    for stage in (1, 2, 3):
        two += [llm(f"cut-zero{stage}", stage, interrupt=INTERRUPT, tear=True), llm(f"cut-zero{stage}", stage)]
    two.append(llm("cut-for-one", 2, interrupt=INTERRUPT))
    go(2, "two", two)
    go(4, "four", [batch_items("batch-four", 1)])
    go(1, "resumed", [llm("one-after-two", 0, copy_from=str(folder / "cut-for-one"))])
    return Outcome(folder, reports)


def _losses(outcome: Outcome, name: str) -> list[float]:
    found: list[float] = outcome.reports[f"{name}/0"]["losses"]
    return found


def test_losses_and_gradients_do_not_depend_on_the_number_of_ranks(outcome: Outcome) -> None:
    for name in ("two-zero0", "two-zero1"):
        np.testing.assert_allclose(_losses(outcome, name), _losses(outcome, "one"), rtol=0, atol=2e-6)
    one, two = (outcome.reports[f"{name}/0"]["grad_norms"] for name in ("one", "two-zero1"))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["batch-one-micro", "batch-two", "batch-two-micro", "batch-three", "batch-four"])
def test_items_of_the_batch_do_not_depend_on_ranks_and_micro_batches(outcome: Outcome, name: str) -> None:
    """The items of the global batch are encoded by parts, by any number of ranks; the last batch has one user."""
    np.testing.assert_allclose(_losses(outcome, name), _losses(outcome, "batch-one"), rtol=0, atol=5e-6)
    one, other = (outcome.reports[f"{run}/0"]["grad_norms"] for run in ("batch-one", name))
    np.testing.assert_allclose(other, one, rtol=2e-4, atol=1e-6)


def test_first_loss_and_gradient_to_1e_6(outcome: Outcome) -> None:
    """Adam's first moment after the first step is (1 - beta1) = 0.1 times the gradient of the first batch."""
    assert _losses(outcome, "two-first") == pytest.approx(_losses(outcome, "one-first"), abs=1e-6)
    one, two = (outcome.tensors(name, "moments", step=1) for name in ("one-first", "two-first"))
    for name in one:
        if name.endswith("exp_avg"):
            np.testing.assert_allclose(two[name], one[name], rtol=0, atol=0.1 * 1e-6, err_msg=name)


def test_zero_stages_agree(outcome: Outcome) -> None:
    for stage in (1, 2, 3):
        np.testing.assert_allclose(
            _losses(outcome, f"two-zero{stage}"), _losses(outcome, "two-zero0"), rtol=0, atol=2e-6
        )
        # Moments, not weights: where a gradient is zero but for rounding (the item head's last bias moves all scores
        # alike), Adam's normalisation turns the rounding into a step.
        moments, expected = outcome.tensors(f"two-zero{stage}", "moments"), outcome.tensors("two-zero0", "moments")
        assert moments.keys() == expected.keys()
        for name in moments:
            np.testing.assert_allclose(moments[name], expected[name], rtol=0, atol=2e-6, err_msg=name)


def test_micro_batches_are_exact(outcome: Outcome) -> None:
    for name in ("one-micro", "two-micro"):
        np.testing.assert_allclose(_losses(outcome, name), _losses(outcome, "one"), rtol=0, atol=5e-6)


@pytest.mark.parametrize("system", ID_SYSTEMS)
def test_dropout_negatives_and_masks_are_the_same_at_any_number_of_ranks(outcome: Outcome, system: str) -> None:
    one, two = (outcome.reports[f"{system}-{ranks}/0"] for ranks in ("one", "two"))
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(two["grad_norms"], one["grad_norms"], rtol=1e-3, atol=1e-5)


def test_recurrent_layers_are_gathered_by_zero_3(outcome: Outcome) -> None:
    """torch's GRU keeps references to its weights beside its parameters."""
    np.testing.assert_allclose(_losses(outcome, "gru4rec-zero3"), _losses(outcome, "gru4rec-one"), rtol=0, atol=2e-5)


def test_adapters_train_alike_on_any_number_of_ranks(outcome: Outcome) -> None:
    """Their dropout masks depend on the token alone; checkpoints hold the adapters and not the LLM."""
    one = outcome.tensors("collm-one", step=4)
    assert sum(".lora_" in name for name in one) == 2 * 2 * 3
    assert not any("base_layer" in name for name in one)
    for name in ("collm-two", "collm-three"):
        np.testing.assert_allclose(_losses(outcome, name), _losses(outcome, "collm-one"), rtol=0, atol=5e-6)
        moments, expected = (outcome.tensors(run, "moments", step=4) for run in (name, "collm-one"))
        assert moments.keys() == expected.keys()
        for key in moments:  # not weights, as in `test_zero_stages_agree`; three updates have let rounding grow
            np.testing.assert_allclose(moments[key], expected[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_titles_are_learned_and_ranked_alike_on_any_number_of_ranks(outcome: Outcome) -> None:
    np.testing.assert_allclose(_losses(outcome, "titles-three"), _losses(outcome, "titles-one"), rtol=0, atol=5e-6)
    one, two = (outcome.reports[f"{name}/0"]["valid"] for name in ("titles-one", "titles-three"))
    for metric in ("HR@1", "MRR"):
        assert two[metric] == pytest.approx(one[metric], abs=1e-6)


def test_a_curriculum_is_the_same_on_any_number_of_ranks(outcome: Outcome) -> None:
    for name in ("llara-two", "llara-three"):
        np.testing.assert_allclose(_losses(outcome, name), _losses(outcome, "llara-one"), rtol=0, atol=2e-5)
    resumed, whole = (outcome.reports[f"llara-{name}/0"] for name in ("cut", "two"))
    assert resumed["losses"] == whole["losses"][resumed["start"] :]
    assert resumed["start"] == INTERRUPT


@pytest.mark.parametrize("name", ["llara-one", "llara-two", "llara-three"])
def test_easy_steps_of_a_curriculum_leave_the_projector_untouched(outcome: Outcome, name: str) -> None:
    """Also after steps that moved it, whose momentum would otherwise carry on."""
    easy = [Curriculum(None, CURRICULUM, "", 0).is_easy(step) for step in range(STEPS)]  # type: ignore[arg-type]
    assert (False, True) in pairwise(easy)
    saved = [outcome.tensors(name, step=step) for step in range(1, STEPS + 1)]
    for step, (before, after) in enumerate(pairwise(saved), 1):
        for key, value in after.items():
            may_be_fixed = easy[step] and key.startswith("reader.item_projector.")
            if may_be_fixed or key in ("reader.item_projector.3.weight", "user_head.0.weight"):
                assert np.array_equal(value, before[key]) == may_be_fixed, (step, key)


def test_each_user_once_per_epoch_at_any_number_of_ranks(outcome: Outcome) -> None:
    one = outcome.reports["one/0"]["users"]
    assert outcome.reports["two-zero1/0"]["users"] == one
    assert sorted(user for step in one[:7] for user in step) == list(range(61))
    shares = zip(outcome.reports["two-zero1/0"]["own"], outcome.reports["two-zero1/1"]["own"], strict=True)
    assert [first + second for first, second in shares] == one


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_inside_an_epoch_is_exact(outcome: Outcome, stage: int) -> None:
    whole, resumed = outcome.reports[f"two-zero{stage}/0"], outcome.reports[f"cut-zero{stage}/0"]
    assert resumed["start"] == 8
    assert resumed["users"] == whole["users"][8:]
    assert resumed["losses"] == whole["losses"][8:]
    for file in ("weights", "moments"):
        expected = outcome.tensors(f"two-zero{stage}", file)
        for name, value in outcome.tensors(f"cut-zero{stage}", file).items():
            assert np.array_equal(value, expected[name]), f"{file} {name}"


def test_resuming_at_a_different_number_of_ranks_and_stage(outcome: Outcome) -> None:
    resumed, whole = outcome.reports["one-after-two/0"], outcome.reports["one/0"]
    assert resumed["start"] == 8
    assert resumed["users"] == whole["users"][8:]
    np.testing.assert_allclose(resumed["losses"], whole["losses"][8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["warm-two", "warm-three"])
def test_a_student_starts_from_another_run_alike_on_any_number_of_ranks(outcome: Outcome, name: str) -> None:
    """Every rank reads the other run's weights on its own, before ZeRO shards them."""
    assert _losses(outcome, "warm-one")[0] < _losses(outcome, "one")[0] - 0.01, "the same batch, after training"
    np.testing.assert_allclose(_losses(outcome, name), _losses(outcome, "warm-one"), rtol=0, atol=2e-6)
    moments, expected = (outcome.tensors(run, "moments", step=WARM) for run in (name, "warm-one"))
    assert moments.keys() == expected.keys()
    for key in moments:
        np.testing.assert_allclose(moments[key], expected[key], rtol=0, atol=2e-6, err_msg=key)
    report, alone = (json.loads((outcome.folder / run / "warm_start.json").read_text()) for run in (name, "warm-one"))
    assert report == alone
    assert (report["items_carried"], report["users_known"], report["parameters_new"]) == (40, 61, 0)


def test_a_warm_start_resumes_exactly(outcome: Outcome) -> None:
    """From its own checkpoint, not once more from the other run."""
    whole, resumed = (outcome.reports[f"{name}/0"] for name in ("warm-two", "warm-cut"))
    assert resumed["start"] == 2
    assert resumed["losses"] == whole["losses"][2:]


def test_frozen_weights_do_not_move_and_trained_ones_are_saved(outcome: Outcome, tiny_llm: Path) -> None:
    first, last = outcome.tensors("one", step=2), outcome.tensors("one")
    assert {"user_out.vector", "item_out.vector"} <= first.keys()
    for name in first:
        assert not np.array_equal(first[name], last[name]), f"{name} did not move"
    untouched = {
        f"reader.llm.{name}": d for name, d in digests(load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))).items()
    }
    for name in ("one/0", "two-zero0/0", "two-zero1/1", "two-zero2/1"):
        after = outcome.reports[name]["frozen"]
        assert {key: after[key] for key in untouched} == untouched
        assert any(key.startswith("reader.teacher.") for key in after)
    assert not any(name.startswith(("reader.llm.", "reader.teacher.")) for name in first)


def test_validation_counts_each_user_once_on_any_number_of_ranks(outcome: Outcome) -> None:
    one = outcome.reports["one/0"]["valid"]
    for name in ("two-zero0/0", "two-zero0/1", "two-zero3/0"):
        for metric, value in outcome.reports[name]["valid"].items():
            assert value == pytest.approx(one[metric], abs=1e-6), metric
