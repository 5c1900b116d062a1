"""A wheel of this tree in an empty environment: all that a user needs travels with it, and nothing of the checkout."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT

from shards.synthetic import write_world

pytestmark = pytest.mark.process

HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables that would lead pip and the installed commands to this checkout; pytest's workers set the first."""
# What the build reads. Copied, so that it leaves no build/ and no egg-info in the repository.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "trainer", "shards", "launchers", "ds_configs")


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel, and an empty folder to work in."""

    wheel: Path
    environment: Path
    work: Path

    def run(self, command: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment; it must succeed."""
        variables = _environment() | {
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        done = subprocess.run(
            [str(self.environment / "bin" / command), *map(str, words)],
            capture_output=True, text=True, timeout=240, env=variables, cwd=self.work, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    @property
    def packages(self) -> Path:
        """Where the wheel was installed."""
        [folder] = self.environment.glob("lib/python*/site-packages")
        return folder


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in HIDDEN}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("packaging")
    tree, wheels, environment, work = (folder / name for name in ("tree", "wheels", "environment", "work"))
    tree.mkdir()
    work.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, tree], check=True, env=_environment()
    )
    [wheel] = wheels.iterdir()
    venv.create(environment, symlinks=True)
    subprocess.run(
        [*pip, "--python", environment / "bin/python", "install", *offline, wheel], check=True, env=_environment()
    )
    built = Installed(wheel, environment, work)
    # The dependencies, from the environment of the tests. Python reads no .pth file of a folder that a .pth file names,
    # so the one that leads an editable installation to this checkout has no effect there.
    (built.packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return built


@pytest.fixture(scope="module")
def dataset(installed: Installed) -> Path:
    """A synthetic dataset, built by the installed command."""
    reviews, catalog = write_world(installed.work.parent / "raw", users=40, items=40)
    out = installed.work.parent / "dataset"
    words = "--source table --time-unit ms --min-item 1 --min-train 3 --negatives 19 --title-negatives 5 --name world"
    installed.run("llm-srec", "shards", "build", out, *words.split(), "--reviews", reviews, "--meta", catalog)
    return out


def test_the_wheel_also_holds_the_files_that_are_not_python(installed: Installed) -> None:
    tree = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "ds_configs/**/*.json",
            "launchers/**/*.s*",
            "trainer/presets/**/*",
            "trainer/**/assets/*",
            "trainer/**/*.py",
        )
        for path in ROOT.glob(pattern)
        if path.is_file()
    }
    assert {"ds_configs/a6000/zero1.json", "launchers/slurm/gaudi.sbatch", "launchers/slurm/rank.sh"} <= tree
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
    assert tree <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "trainer", "shards", "launchers", "ds_configs",
    }  # fmt: skip
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_what_runs_is_what_was_installed(installed: Installed) -> None:
    code = "import trainer, shards, launchers; print(trainer.__file__, shards.__file__, launchers.__file__)"
    files = installed.run("python", "-c", code).stdout.split()
    assert files == [str(installed.packages / name / "__init__.py") for name in ("trainer", "shards", "launchers")]
    assert "llm-srec train sasrec" in installed.run("llm-srec", "--help").stdout
    assert installed.run("llm-srec", "--version").stdout == "llm-srec 0.1.0\n"


def test_a_packaged_preset_trains_from_an_empty_folder(installed: Installed, dataset: Path) -> None:
    words = [f"data.path={dataset}", "output=run", "train.max_steps=2", "train.batch_size=16", "engine.threads=1"]
    done = installed.run("llm-srec", "train", "quickstart_sasrec", *words)
    assert "sasrec" in done.stdout
    assert {path.name for path in installed.work.iterdir()} == {"run"}
    run = installed.work / "run"
    assert (run / "results.jsonl").is_file()
    assert str(ROOT) not in (run / "config.yaml").read_text()


def test_a_job_takes_its_code_from_the_installed_packages(
    installed: Installed, dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["submit", "a6000", "sasrec", f"data.path={dataset}", f"output={tmp_path / 'run'}", "--per-node=1"]
    shown = installed.run("llm-srec", *words, "--dry-run").stdout
    assert f"with a copy of {installed.packages} as code/" in shown
    # Stands in for Slurm's sbatch, whose last two arguments are the script and the job's folder.
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\nfor word; do script=$folder; folder=$word; done\ntest -f "$script" && echo 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    assert installed.run("llm-srec", *words).stdout.startswith("job 7: 1 run(s)")
    [code] = (tmp_path / "run/slurm").glob("*/code")
    for name in ("launchers/train.py", "launchers/slurm/common.sh", "ds_configs/zero1.json", "shards/manifest.py"):
        assert (code / name).is_file(), name
    assert (code / "COMMIT").read_text() == "unknown\n"
