"""Dockerfile and Apptainer recipe, as far as they can be checked without building an image."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest
from helpers import ROOT

from launchers.slurm.options import build_parser

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
APPTAINER = (ROOT / "apptainer.def").read_text().replace("\\\n", " ")


def targets() -> dict[str, list[list[str]]]:
    """Instructions of each build target, in words; without those of its base."""
    found: dict[str, list[list[str]]] = {}
    for line in DOCKERFILE.splitlines():
        words = [] if line.startswith("#") else shlex.split(line)
        if words[:1] == ["FROM"]:
            found[words[-1]] = []
        if words and found:
            found[list(found)[-1]].append(words)
    return found


def copied(target: str) -> set[str]:
    """Files and folders that a target and its base copy."""
    return {
        name for stage in ("base", target) for words in targets()[stage] if words[0] == "COPY" for name in words[1:-1]
    }


def section(name: str) -> list[str]:
    """Lines of a section of the Apptainer recipe."""
    [body] = re.findall(rf"^%{name}\n((?:    .*\n|\n)+)", APPTAINER, re.MULTILINE)
    return [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]


def needed() -> set[str]:
    """What `pip install .` reads, and the constraints."""
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    project = PROJECT["project"]
    return packages | {
        project["readme"],
        *project["license-files"],
        "pyproject.toml",
        "requirements/constraints.txt",
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_gets_what_the_package_needs_and_nothing_else(target: str) -> None:
    assert copied(target) == needed()
    assert all((ROOT / name).exists() for name in needed())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == needed()


def test_apptainer_copies_the_same_files() -> None:
    pairs = [line.split() for line in section("files")]
    assert {source for source, _ in pairs} == needed()
    assert all(place == f"/opt/llm-srec/{source}" for source, place in pairs)


def test_versions_are_those_of_the_constraints() -> None:
    commands = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    commands += [line for line in section("post") if line.startswith("pip install")]
    assert len(commands) == 6
    assert all("--constraint" in line and "requirements/constraints.txt" in line for line in commands)
    assert "==" not in DOCKERFILE + APPTAINER
    # The base images: one version of Python in both, which the package supports and ruff checks for.
    versions = re.findall(r"python:([\d.]+)-slim", DOCKERFILE + APPTAINER)
    assert len(set(versions)) == 1
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
    assert f"py{versions[0].replace('.', '')}" == PROJECT["tool"]["ruff"]["target-version"]


def test_cuda_is_the_one_that_the_installation_names() -> None:
    [docker] = re.findall(r"^ARG CUDA=(\w+)$", DOCKERFILE, re.MULTILINE)
    arguments = dict(line.split("=", 1) for line in section("arguments"))
    assert docker == arguments["TORCH"]
    assert f"https://download.pytorch.org/whl/{docker}" in (ROOT / "docs/clusters.md").read_text()
    # Every argument is used, and every placeholder is an argument.
    assert set(re.findall(r"\{\{ (\w+) \}\}", APPTAINER)) == set(arguments)
    extras = re.findall(r'[".\w/]\[([\w,]+)\]', "\n".join(section("arguments")) + DOCKERFILE)
    assert extras == ["cuda", "cuda"]
    assert "cuda" in PROJECT["project"]["optional-dependencies"]


def test_the_command_of_an_image_is_that_of_the_package() -> None:
    entries = [words[1:] for stage in ("cpu", "cuda") for words in targets()[stage] if words[0] == "ENTRYPOINT"]
    assert entries == [["[llm-srec]"]] * 2
    assert 'exec llm-srec "$@"' in section("runscript")
    assert "llm-srec" in PROJECT["project"]["scripts"]
    # `submit.py --apptainer` runs python3 of the image.
    options = build_parser("submit.py", "").parse_args(["a6000", "sasrec", "--apptainer", "llm-srec.sif"])
    assert options.apptainer == "llm-srec.sif"
