"""`submit.py` on a login node: a dry run needs neither torch nor Slurm."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, llm_srec_config, sasrec_config, text_config, write_config
from launch_helpers import Refused, one_error

from launchers.slurm.submit import main
from trainer.config import ConfigError, load_config, parse_config
from trainer.workflows.comparing.sweep import sweep
from trainer.workflows.slurm_job import mounts

# As on a login node: these cannot be imported.
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'deepspeed', 'transformers']); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture
def preset(tmp_path: Path, world: Path) -> Path:
    return write_config(tmp_path / "sasrec.yaml", sasrec_config(world, tmp_path / "run"))


def login_node(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The real command, without torch and without Slurm."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "launchers/slurm/submit.py"), *map(str, words)]
    environment = {**os.environ, "PATH": "/nowhere"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd="/", check=False)


def previewed(text: str) -> dict[str, str]:
    """The files that `--dry-run` shows, by name."""
    parts = text.split("\n--- ")[1:]
    return dict(part.split("\n", 1) for part in parts)


def test_a_dry_run_shows_everything_and_writes_nothing(preset: Path, tmp_path: Path) -> None:
    done = login_node(
        "a6000", preset, "train.lr=0.01", "--nodes", "2", "--partition=gpu", "--account=lab", "--time=8:00:00",
        "--sbatch=--qos=high", "--dry-run", "seed=5",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    files = previewed(done.stdout)
    command = shlex.split(files["command.txt"])
    expected = {
        "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gres=gpu:4", "--partition=gpu", "--account=lab",
        "--time=8:00:00", "--qos=high", "--job-name=run", "--mem=0",
    }  # fmt: skip
    assert expected <= set(command)
    script, folder = command[-2:]
    assert script == f"{folder}/code/launchers/slurm/a6000.sbatch"
    assert Path(folder).parent == tmp_path / "run/slurm"
    config = yaml.safe_load(files["0.yaml"])
    assert (config["train"]["lr"], config["seed"], config["train"]["betas"]) == (0.01, 5, [0.9, 0.98])
    assert files["runs.txt"] == f"{tmp_path / 'run'}\n"
    assert f"PYTHON={sys.executable}\n" in files["job.env"]
    assert "DS_ACCELERATOR=cuda\n" in files["job.env"]
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_start_is_refused_before_it_queues(preset: Path, tmp_path: Path) -> None:
    done = login_node("a6000", preset, "train.lrr=1")
    assert "unknown key 'train.lrr'" in one_error(done.returncode, done.stdout, done.stderr)
    done = login_node("gaudi", preset, "--nodes=3", "--dry-run")
    assert "24 ranks cannot share a batch of 16 users" in one_error(done.returncode, done.stdout, done.stderr)
    done = login_node("gaudi", preset)
    assert "sbatch is not on this machine: submit from a login" in one_error(done.returncode, done.stdout, done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_language_model_is_named_before_it_queues(
    tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path
) -> None:
    llm = Path(shutil.copytree(tiny_llm, tmp_path / "llm"))
    (llm / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9085657\n")
    preset = write_config(tmp_path / "srec.yaml", llm_srec_config(world, tmp_path / "run", teacher, llm))
    done = login_node("a6000", preset)
    assert done.returncode == 2
    assert f"{llm} is not a language model: model.safetensors is a Git LFS pointer" in one_error(*_streams(done))
    assert not (tmp_path / "run").exists()


def _streams(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


def test_fp8_is_refused_for_gaudi_from_any_machine(
    refused: Refused, tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path
) -> None:
    preset = write_config(tmp_path / "llm.yaml", llm_srec_config(world, tmp_path / "run", teacher, tiny_llm))
    words = ["--per-node=1", "system.llm.quantization=fp8", "system.llm.dtype=bfloat16"]
    assert "cannot run on Gaudi" in refused(main, "gaudi", preset, *words, DS_ACCELERATOR="cpu")


def test_a_sweep_is_an_array_over_the_grid(preset: Path, tmp_path: Path) -> None:
    done = login_node("a6000", preset, "--sweep=train.lr=1e-3,1e-4", "--sweep=seed=0,1", "--at-once=2", "--dry-run")
    files = previewed(done.stdout)
    assert "--array=0-3%2" in files["command.txt"]
    outputs = files["runs.txt"].splitlines()
    assert outputs[1] == f"{tmp_path}/run/train.lr=1e-3_seed=1"
    for index, output in enumerate(outputs):
        config = yaml.safe_load(files[f"{index}.yaml"])
        assert (config["output"], config["seed"]) == (output, index % 2)
        assert config["train"]["lr"] == (1e-3, 1e-4)[index // 2]


@pytest.mark.parametrize("axis", ["train.lr", "train.lr=", "train.lr=1,,2", "output=a,b"])
def test_an_invalid_sweep(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"--sweep {axis.split('=')[0]}"):
        list(sweep([axis]))


def test_containers_see_what_the_run_reads(preset: Path, tmp_path: Path, world: Path) -> None:
    apptainer = previewed(login_node("a6000", preset, "--apptainer=/images/a.sif", "--dry-run").stdout)["job.env"]
    assert "CONTAINER=apptainer\nIMAGE=/images/a.sif\nMOUNTS=" in apptainer
    mounted = apptainer.split("\nMOUNTS=")[1].split("\n")[0].split(",")
    assert {f"{tmp_path}/run:{tmp_path}/run", f"{world}:{world}"} <= set(mounted)
    assert "PYTHON=python3\n" in apptainer
    assert "CONTAINER=pyxis\n" in previewed(login_node("gaudi", preset, "--pyxis=a", "--dry-run").stdout)["job.env"]


def test_containers_see_models_and_prefix_caches(world: Path, teacher: Path) -> None:
    tree = llm_srec_config(world, Path("/run"), teacher, Path("/models/llm"))
    tree["system"]["llm"]["title_store"] = "/stores/titles"
    encoder = {"name": "recformer_pretrain", "encoder": {"path": "/models/encoder"}}
    configs = [parse_config(tree, "test"), parse_config(text_config(world, Path("/run"), encoder), "test")]
    configs.append(parse_config(llm_srec_config(world, Path("/run"), teacher, Path("hub/id")), "test"))
    folders = {Path("/run"), world, teacher, *map(Path, ("/models/llm", "/stores/titles", "/models/encoder"))}
    assert set(mounts(Path("/run"), configs).split(",")) == {f"{folder}:{folder}" for folder in folders}


def test_a_rank_starts_in_any_folder(tmp_path: Path) -> None:
    """pyxis starts it in the working folder of the image."""
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$@"\n')
    interpreter.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"], "PYTHON": str(interpreter), "JOB": "/job", "CONFIG": "/job/0.yaml",
        "OWNER": "/job/owner", "CLAIM": "1.0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "launchers/slurm/rank.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd="/", check=True)
    assert done.stdout == "/job/code/launchers/train.py /job/0.yaml\n"


def test_memory_is_asked_for(preset: Path) -> None:
    def memory(*words: str) -> list[str]:
        command = previewed(login_node("a6000", preset, *words, "--dry-run").stdout)["command.txt"]
        return [word for word in shlex.split(command) if word.startswith("--mem")]

    assert memory("--mem=100G", "--per-node=1") == ["--mem=100G"]
    assert memory("--per-node=1") == [], "other jobs may use the rest of the node"


def test_an_own_deepspeed_file_is_copied(preset: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text((ROOT / "ds_configs/zero2.json").read_text())
    files = previewed(login_node("a6000", preset, f"engine.deepspeed={own}", "--dry-run").stdout)
    folder = shlex.split(files["command.txt"])[-1]
    assert yaml.safe_load(files["0.yaml"])["engine"]["deepspeed"] == f"{folder}/0.deepspeed.json"
    assert files["0.deepspeed.json"].strip() == own.read_text().strip()


def test_a_dry_run_shows_a_valid_preset(preset: Path, tmp_path: Path) -> None:
    shown = tmp_path / "shown.yaml"
    shown.write_text(previewed(login_node("a6000", preset, "--dry-run").stdout)["0.yaml"])
    assert load_config(shown) == load_config(preset)


def test_an_experiment_is_an_array_per_level(tmp_path: Path, world: Path, tiny_llm: Path) -> None:
    """Teachers first, then what builds on them, on a login node without torch."""
    sasrec = write_config(tmp_path / "sasrec.yaml", sasrec_config(world, tmp_path / "unused"))
    srec = llm_srec_config(world, tmp_path / "unused", tmp_path / "unused", tiny_llm)
    systems = {
        "sasrec": {"preset": str(sasrec)},
        "llm_srec": {"preset": str(write_config(tmp_path / "srec.yaml", srec)), "builds_on": {"teacher": "sasrec"}},
    }
    recipe = write_config(tmp_path / "recipe.yaml", {"title": "tiny", "systems": systems})
    words: list[str | Path] = ["--data", world, "--recipe", recipe, "--runs", tmp_path / "runs", "--seeds", "2"]
    done = login_node("a6000", "--experiment", "table8", *words, "--dry-run", "--per-node", "1", "--cpu")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (previewed("\n--- " + part) for part in done.stdout.split("would write ")[1:])
    assert [len(files["runs.txt"].splitlines()) for files in (first, second)] == [2, 12]
    assert "--array=0-1" in shlex.split(first["command.txt"])
    assert "--array=0-11" in shlex.split(second["command.txt"])
    config = yaml.safe_load(second["0.yaml"])
    assert f"{config['system']['teacher']}\n" in first["runs.txt"]
    assert config["output"] in second["runs.txt"]
    assert not (tmp_path / "runs").exists()
    refusal = login_node("a6000", sasrec, "--experiment", "table8", *words)
    assert one_error(refusal.returncode, refusal.stdout, refusal.stderr).startswith("error: give a preset, or --exp")
