"""Bad input to `launchers/train.py`: one line that names the thing and the cure, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, build_world, llm4rec_config, llm_srec_config, run_command, sasrec_config, write_config
from launch_helpers import Refused, Trained, contents, one_error

from launchers.evaluate import main as evaluate_main
from launchers.train import main
from shards.manifest import file_sha256
from trainer.runs.folder import RunFolder, files_json


@pytest.fixture
def dataset(tmp_path: Path, world: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(world, tmp_path / "copy"))


@pytest.fixture
def llm(tmp_path: Path, tiny_llm: Path) -> Path:
    """A copy of the language model that a test may damage."""
    return Path(shutil.copytree(tiny_llm, tmp_path / "llm"))


@pytest.fixture(scope="module")
def other_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a different catalog."""
    return build_world(tmp_path_factory.mktemp("other"), users=30, items=36, seed=5)


def refuse(refused: Refused, preset: Path, *words: str, **environment: str) -> str:
    error = refused(main, preset, *words, **environment)
    assert not (preset.parent / "run").exists()
    return error


# Found without torch, by the real command: (words after the preset, expected part of the error line).
EARLY = {
    "wrong key": (["train.lrr=1"], "unknown key 'train.lrr' (did you mean 'lr'?)"),
    "wrong value": (["train.lr=fast"], "'train.lr': Input should be a valid number"),
    "no override": (["train.lr"], "write section.key=value"),
    "no dataset": (["data.path=/nowhere"], "/nowhere is not a dataset (no manifest.json): build one"),
    "no teacher": (["system.teacher=/nowhere"], "system.teacher=/nowhere is not a run folder: train one with"),
    "no llm": (["system.llm.path=/nowhere"], "there is no such folder; set system.llm.path"),
    "unknown deepspeed config": (["engine.deepspeed=zero9"], "names in ds_configs: zero0, zero1"),
}


@pytest.mark.parametrize(("words", "said"), EARLY.values(), ids=EARLY)
def test_what_needs_no_torch_is_reported_at_once(preset: Path, words: list[str], said: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "launchers/train.py"), str(preset), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said_lines = [line for line in done.stderr.splitlines() if line not in imported]
    assert said in one_error(done.returncode, done.stdout, "".join(f"{line}\n" for line in said_lines))
    assert not (preset.parent / "run").exists()
    names = {line.rpartition("|")[2].strip() for line in imported}
    assert "json" in names
    assert not names & {"torch", "deepspeed", "transformers"}  # they take 5 to 8 s


def test_a_missing_preset_lists_the_presets() -> None:
    done = run_command("launchers/train.py", "/nowhere/llm_srec.yaml")
    error = one_error(done.returncode, done.stdout, done.stderr)
    assert "no such file: /nowhere/llm_srec.yaml" in error
    presets = sorted(path.name for path in (ROOT / "trainer/presets").glob("*.yaml"))
    assert f"presets in trainer/presets: {', '.join(presets)}" in error


def test_too_many_ranks_are_refused_before_they_wait_for_each_other(preset: Path) -> None:
    launcher = {"WORLD_SIZE": "11", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}
    done = run_command("launchers/train.py", preset, env={**launcher, "RANK": "0"}, timeout=20)
    error = one_error(done.returncode, done.stdout, done.stderr)
    assert "11 ranks cannot share a batch of 10 users: start at most 10 ranks or raise train.batch_size" in error
    assert not (preset.parent / "run").exists()


def test_an_incomplete_launcher_environment_is_refused(refused: Refused, preset: Path) -> None:
    assert "RANK is set but MASTER_ADDR is not" in refuse(refused, preset, RANK="0", WORLD_SIZE="2")


# ---------------------------------------------------------------------------------------------- dataset


def test_a_folder_that_is_not_a_dataset(refused: Refused, preset: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no manifest.json" in refuse(refused, preset, f"data.path={tmp_path / 'empty'}")
    assert "is not a dataset" in refuse(refused, preset, f"data.path={preset}")


def test_a_dataset_whose_manifest_cannot_be_read(refused: Refused, preset: Path, dataset: Path) -> None:
    (dataset / "manifest.json").unlink()
    (dataset / "manifest.json").mkdir()
    assert f"{dataset}/manifest.json cannot be read" in refuse(refused, preset, f"data.path={dataset}")


def test_a_flipped_byte_is_found_by_its_checksum(refused: Refused, preset: Path, dataset: Path) -> None:
    shard = next(dataset.rglob("*.tar"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(bytes(damaged))
    error = refuse(refused, preset, f"data.path={dataset}")
    assert f"{shard} is damaged" in error
    assert "copy the dataset again or rebuild it" in error


def test_a_deleted_or_cut_file_is_found_even_without_checksums(refused: Refused, preset: Path, dataset: Path) -> None:
    shard = next(dataset.rglob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    said = f"{shard} has {len(whole) - 512} bytes, the manifest says {len(whole)}: copy the dataset again"
    assert said in refuse(refused, preset, f"data.path={dataset}", "data.verify=false")
    shard.unlink()
    assert f"{shard} is missing: copy" in refuse(refused, preset, f"data.path={dataset}", "data.verify=false")


# ---------------------------------------------------------------------------------------------- teacher


@pytest.mark.process
def test_a_teacher_that_is_not_a_sasrec_run(refused: Refused, preset: Path, srec: Trained) -> None:
    error = refuse(refused, preset, f"system.teacher={srec.output}")
    assert f"system.teacher={srec.output} is a llm_srec run, not a sasrec run" in error


def test_a_teacher_that_has_not_validated(refused: Refused, preset: Path, teacher: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(teacher / "config.yaml", young)
    error = refuse(refused, preset, f"system.teacher={young}")
    assert f"{young} has no best checkpoint yet: let it train until its first validation" in error


def test_a_damaged_teacher_names_the_file(refused: Refused, preset: Path, teacher: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(teacher, tmp_path / "damaged"))
    for file in damaged.glob("checkpoints/step-*/weights.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    step = json.loads((damaged / "checkpoints/best.json").read_text())["step"]
    error = refuse(refused, preset, f"system.teacher={damaged}")
    assert f"{damaged}/checkpoints/step-{step:08d}/weights.safetensors is damaged" in error
    assert "or train a new teacher" in error


def test_a_teacher_of_a_different_catalog(refused: Refused, preset: Path, teacher: Path, other_world: Path) -> None:
    error = refuse(refused, preset, f"data.path={other_world}")
    assert f"the teacher {teacher} was trained on a different catalog than {other_world}: train a teacher" in error


# ---------------------------------------------------------------------------------------------- LLM


def test_an_encoder_is_not_a_causal_lm(refused: Refused, preset: Path, llm: Path) -> None:
    from transformers import BertConfig, BertModel, T5Config, T5Model

    small = BertConfig(vocab_size=400, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    BertModel(small).save_pretrained(llm)
    assert f"{llm} holds a 'bert', not a causal LM; set" in refuse(refused, preset, f"system.llm.path={llm}")
    T5Model(T5Config(vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(llm)
    assert f"{llm} holds a 't5', not a causal LM; set" in refuse(refused, preset, f"system.llm.path={llm}")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b'{"model_type":', "config.json' is not a valid JSON file"),
        ("config.json", b"{}", "Unrecognized model"),
        ("config.json", None, "is not a language model"),
        ("tokenizer.json", None, "has no tokenizer (no tokenizer.json or tokenizer.model)"),
        ("tokenizer.json", b"{", "has no tokenizer that loads"),
        ("model.safetensors", None, "it has no weights; set"),
        ("model.safetensors", b"garbage, garbage, garbage", "cannot load the weights"),
    ],
)
def test_a_damaged_llm_folder(
    refused: Refused, preset: Path, llm: Path, file: str, content: bytes | None, said: str
) -> None:
    (llm / file).unlink()
    if content is not None:
        (llm / file).write_bytes(content)
    error = refuse(refused, preset, f"system.llm.path={llm}")
    assert said in error
    assert str(llm) in error
    assert "set system.llm.path to a folder with config.json, safetensors weights and a tokenizer" in error


def test_cut_weights(refused: Refused, preset: Path, llm: Path) -> None:
    weights = llm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert f"cannot load the weights of {llm}" in refuse(refused, preset, f"system.llm.path={llm}")


def test_weights_that_lack_a_tensor_are_an_error(refused: Refused, preset: Path, llm: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(llm / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    error = refuse(refused, preset, f"system.llm.path={llm}")
    assert f"the weights of {llm} lack layers.1.mlp.up_proj.weight (1 missing): copy them again" in error


def test_more_layers_than_the_llm_has(refused: Refused, preset: Path, tiny_llm: Path) -> None:
    error = refuse(refused, preset, "system.llm.layers=4")
    assert f"system.llm.layers=4, but {tiny_llm} has 3 layers: lower it" in error


def test_rows_too_short_for_a_prompt(refused: Refused, preset: Path) -> None:
    error = refuse(refused, preset, "system.llm.max_tokens=64")
    assert "system.llm.max_tokens=64 cannot hold a prompt with one item: set at least" in error


def test_a_hub_model_that_cannot_be_reached(preset: Path) -> None:
    done = run_command("launchers/train.py", preset, "system.llm.path=cache/smollm2-135m", env={"HF_HUB_OFFLINE": "1"})
    error = one_error(done.returncode, done.stdout, done.stderr)
    assert "system.llm.path=cache/smollm2-135m is not a language model: there is no such folder" in error
    assert "hub cannot be reached (or HF_HUB_OFFLINE is set); set system.llm.path to a folder" in error


# ---------------------------------------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"optimizer": {"type": "Adam"}}', "sets 'optimizer': remove it there and use train.lr"),
        ('{"zero_optimization": ', "is not valid JSON"),
        ("[]", "must contain a JSON object"),
        ('{"zero_optimization": {"stage": 7}}', "DeepSpeed rejects engine.deepspeed="),
        (None, "no such file"),
    ],
)
def test_a_deepspeed_file_that_cannot_work(
    refused: Refused, preset: Path, tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    error = refuse(refused, preset, f"engine.deepspeed={tmp_path / 'ds.json'}")
    assert said in error
    assert str(tmp_path / "ds.json") in error


def test_int8_where_it_cannot_run(refused: Refused, preset: Path) -> None:
    int8 = "system.llm.quantization=int8"
    for name in ("zero3", "a6000/zero3_offload"):
        error = refuse(refused, preset, int8, f"engine.deepspeed={name}")
        assert f"{int8} saves nothing under ZeRO-3 (engine.deepspeed={name})" in error
        assert "use engine.deepspeed=zero2, or quantization=none" in error


def test_weights_that_are_quantized_already(refused: Refused, preset: Path, llm: Path, with_bitsandbytes: None) -> None:
    """Before torch is imported, and whatever they are quantized with."""
    settings = json.loads((llm / "config.json").read_text())
    for method, words, said in (
        ("gptq", [], f"{llm} is not a language model: its weights are quantized (gptq), and of quantized weights only"),
        ("bitsandbytes", ["system.llm.quantization=int8"], f"quantized already ({llm}: bitsandbytes): set system.llm."),
        ("bitsandbytes", ["engine.deepspeed=zero3"], f"{llm} holds quantized weights (bitsandbytes), which ZeRO-3"),
    ):
        changed = settings | {"quantization_config": {"quant_method": method, "load_in_4bit": method != "gptq"}}
        (llm / "config.json").write_text(json.dumps(changed))
        assert said in refuse(refused, preset, f"system.llm.path={llm}", *words)


def test_fp8_where_it_cannot_run(refused: Refused, preset: Path) -> None:
    fp8 = "system.llm.quantization=fp8"
    error = refuse(refused, preset, fp8, "engine.deepspeed=zero3")
    assert f"{fp8} saves nothing under ZeRO-3 (engine.deepspeed=zero3): this trainer keeps all fp8 weights on" in error
    error = refuse(refused, preset, fp8, DS_ACCELERATOR="hpu")
    assert f"{fp8} cannot run on Gaudi: torch has no fp8 matrix product there; use" in error


# ---------------------------------------------------------------------------------------------- output


@pytest.mark.process
def test_an_existing_run_is_not_touched_by_a_different_one(
    refused: Refused, srec: Trained, teacher: Path, other_world: Path, tmp_path: Path
) -> None:
    before = contents(srec.output), contents(teacher)
    assert "already holds a run and resume=never: choose another output" in refused(main, srec.preset, "resume=never")
    error = refused(main, srec.preset, "train.lr=0.5", "train.epochs=9", "system.max_history=4", "engine.threads=1")
    changes = "system.max_history is 5 there, 4 here, train.lr is 0.001 there, 0.5 here"
    assert f"{srec.output} holds a run with different settings ({changes}); choose another output" in error

    sasrec = write_config(tmp_path / "sasrec.yaml", sasrec_config(other_world, teacher))
    error = refused(main, sasrec)
    assert f"{teacher} was trained on a different dataset than {other_world} holds now; choose another output" in error
    error = refused(main, sasrec, f"output={srec.output}")
    assert "(system.name is llm_srec there, sasrec here)" in error
    assert (contents(srec.output), contents(teacher)) == before


@pytest.mark.parametrize("part", ["language model or encoder", "teacher"])
@pytest.mark.process
def test_a_run_does_not_resume_with_a_different_llm_or_teacher(
    refused: Refused, srec: Trained, world: Path, teacher: Path, tiny_llm: Path, tmp_path: Path, part: str
) -> None:
    run = Path(shutil.copytree(srec.output, tmp_path / "run"))
    for state in run.glob("checkpoints/*/state.json"):
        tree = json.loads(state.read_text())
        identity = tree["identity"]
        place, key = (identity["built_on"], part) if part == "teacher" else (identity, "llm")
        place[key] = "of then"
        state.write_text(json.dumps(tree))
        files = state.with_name("files.json")
        files.write_text(files_json(json.loads(files.read_text()) | {"state.json": file_sha256(state)}))
    marker = run / "checkpoints/best.json"
    marker.write_text(RunFolder(run).best_json(json.loads(marker.read_text())["step"]))
    before = contents(run)
    preset = write_config(tmp_path / "preset.yaml", llm_srec_config(world, run, teacher, tiny_llm))
    error = refused(main, preset)
    assert f"{run} was trained with a different {part} than the current one; choose another output" in error
    error = refused(evaluate_main, run)
    assert f"the {part} of {run} is not the one it was trained with: restore the original" in error
    assert contents(run) == before


def test_an_output_that_is_a_file(refused: Refused, preset: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    said = f"{file} is a file: choose another output"
    assert said in refused(main, preset, f"output={file}")
    assert said in refused(main, preset, f"output={file}/run")
    assert file.read_text() == "mine"


# ---------------------------------------------------------------------------------------------- negatives


@pytest.mark.parametrize("policy", ["exclude_user", "official"])
def test_more_candidates_than_a_user_leaves(refused: Refused, preset: Path, policy: str) -> None:
    error = refuse(refused, preset, "system.train_candidates=41", f"system.negative_policy={policy}")
    assert "system.train_candidates=41 needs 40 items outside a user's history, but one user leaves" in error
    assert "lower it, or build a dataset with more items" in error


def test_gbce_cannot_use_more_negatives_than_other_items(refused: Refused, tmp_path: Path, world: Path) -> None:
    preset = write_config(tmp_path / "preset.yaml", sasrec_config(world, tmp_path / "run"))
    error = refuse(refused, preset, "system.loss=gbce", "system.negatives=40")
    assert "system.negatives=40, but gbce can use at most 39" in error


# ------------------------------------------------------------------------- older items and items of the batch


def test_more_items_than_the_teacher_reads(refused: Refused, preset: Path) -> None:
    error = refuse(refused, preset, "system.max_history=5", "system.max_vector_items=8")
    assert "system.max_vector_items=8 and system.max_history=5 show 13 items, but the teacher" in error
    assert "reads only 12: set system.max_vector_items=7 or less, or train a teacher with system.max_length=13" in error


def test_bare_item_vectors_without_a_teacher(refused: Refused, world: Path, tiny_llm: Path, tmp_path: Path) -> None:
    preset = write_config(tmp_path / "preset.yaml", llm4rec_config("tallrec", world, tmp_path / "run", tiny_llm, {}))
    error = refuse(refused, preset, "system.max_vector_items=3")
    assert "system.max_vector_items=3 shows a teacher's item vectors, but this system shows titles alone" in error
    assert "train llara, collm, a_llmrec or llm_srec" in error


def test_a_learning_rate_that_is_0_before_the_run_ends(refused: Refused, preset: Path) -> None:
    error = refuse(refused, preset, "train.decay_steps=10", "train.epochs=2")
    assert "train.decay_steps=10: the learning rate would be 0 long before the run ends at step 14" in error


def test_a_decay_that_begins_after_its_end(refused: Refused, preset: Path) -> None:
    cure = "set train.decay_steps to the steps of the run, or leave decay_from out"
    assert cure in refuse(refused, preset, "train.decay_from=5")
    assert cure in refuse(refused, preset, "train.decay_steps=14", "train.decay_from=14")


def test_items_of_a_batch_of_one_user(refused: Refused, preset: Path) -> None:
    words = ("system.train_candidates=batch", "system.batch_negatives=0", "train.batch_size=1")
    error = refuse(refused, preset, *words)
    assert (
        "leaves no item to compare a target with: set system.batch_negatives=3, or a larger train.batch_size" in error
    )


def test_items_of_a_batch_leave_out_all_items_of_a_user(refused: Refused, preset: Path) -> None:
    error = refuse(refused, preset, "system.train_candidates=batch", "system.negative_policy=official")
    assert "set system.negative_policy=exclude_user" in error


def test_items_of_a_batch_need_their_negatives(refused: Refused, preset: Path) -> None:
    error = refuse(refused, preset, "system.train_candidates=batch", "system.batch_negatives=40")
    assert "system.batch_negatives=40 needs 40 items outside a user's history" in error


def test_settings_that_would_change_nothing(refused: Refused, preset: Path, world: Path, tiny_llm: Path) -> None:
    error = refuse(refused, preset, "system.score_distill_weight=1")
    assert "set system.train_candidates=batch, or leave it out" in error
    tallrec = write_config(
        preset.with_name("tallrec.yaml"), llm4rec_config("tallrec", world, Path("run"), tiny_llm, {})
    )
    error = refuse(refused, tallrec, "system.projector_init=token_scale")
    assert "this system has no projectors: leave it out" in error
