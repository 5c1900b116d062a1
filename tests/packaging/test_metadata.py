"""Facts that several files repeat."""

from __future__ import annotations

import re
import tomllib

import yaml
from helpers import ROOT


def test_the_citation_is_of_this_version_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"], project["version"], project["license"],
    )  # fmt: skip
    assert project["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_a_commit_is_checked_as_make_lint_checks() -> None:
    [recipe] = re.findall(r"^lint: install\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    *hooks, shellcheck = local["hooks"]
    assert [hook["entry"] for hook in hooks] == made[:-1]
    # Only shellcheck is handed files: those that the recipe names.
    command, options, *patterns = made[-1].split()
    assert shellcheck["entry"] == f"{command} {options}"
    scripts = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ("launchers", "tests", "benchmarks")
        for path in (ROOT / top).glob("**/*.s*")
    }
    assert {path for path in found if re.search(shellcheck["files"], path)} == scripts
