"""The site: it builds without a warning, and what is generated is complete."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from config_reference import configuration_tables, keys, systems
from error_table import error_tables, messages
from helpers import ROOT

from trainer.config import RunConfig
from trainer.config.presets import PRESETS


def test_every_configuration_key_is_on_the_page_with_its_meaning() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", configuration_tables(ROOT), re.MULTILINE))
    every = list(keys(RunConfig))
    for model in systems().values():
        every += keys(model, "system.")
    assert len(every) > 250
    assert set(rows) == {key.name for key in every}
    assert [key.name for key in every if not key.meaning] == [], "write a docstring below the field"
    assert all(key.type for key in every)


def test_a_key_is_shown_with_its_type_and_default() -> None:
    tables = configuration_tables(ROOT)
    assert "| `train.lr` | number > 0 | `0.0001` | Peak learning rate of Adam. |" in tables
    assert "| `train.max_steps` | integer ≥ 1, or none | `null` |" in tables
    assert "| `train.betas` | list of 2: number ≥ 0, < 1 | `[0.9, 0.98]` |" in tables
    assert "| `data.path` | path | required |" in tables
    assert "| `system.user_vector` | `true` `false`, or `end` | `false` |" in tables
    assert "| `system.lora.alpha` | integer ≥ 1 | `32` |" in tables  # LLaRA's
    assert "| `system.lora.alpha` | integer ≥ 1 | `16` |" in tables


def test_errors_are_listed_with_their_cures() -> None:
    found = {message.text: message.file for message in messages(ROOT)}
    assert len(found) > 300
    # A plain text; one with values; one whose cure is a constant of the module.
    assert found["give the dataset: --data DIR"] == "launchers/experiment_options.py"
    bad_override = "'<word>' is not an override: write section.key=value, for example train.lr=3e-4"
    assert found[bad_override] == "trainer/config/load.py"
    assert any("set system.llm.path to a model with a different tokenizer" in text for text in found)
    table = error_tables(ROOT)
    assert all(
        html.escape(text).replace("|", "&#124;").replace("`", "&#96;").replace("*", "&#42;") in table for text in found
    )


def test_messages_that_the_page_explains_exist() -> None:
    page = (ROOT / "docs/reference/troubleshooting.md").read_text()
    sources = " ".join(
        path.read_text() for top in ("trainer", "shards", "launchers") for path in (ROOT / top).rglob("*.py")
    )
    # Of shells and of argparse.
    others = {"No module named launchers", "llm-srec: command not found", "--lr=1e-3: unrecognized arguments"}
    explained = {
        text for bold in re.findall(r"^\*\*(.*?)\*\*", page, re.MULTILINE) for text in re.findall(r"`([^`]+)`", bold)
    }
    assert len(explained) > 8
    assert {text for text in explained - others if text not in sources} == set()


def test_every_system_and_preset_is_on_their_page() -> None:
    page = (ROOT / "docs/systems.md").read_text()
    presets = {path.stem for path in PRESETS.glob("**/*.yaml") if path.parent.name not in ("experiments", "recipes")}
    trained = {
        yaml.safe_load(path.read_text())["system"]["name"] for path in PRESETS.glob("**/*.yaml") if path.stem in presets
    }
    assert trained == set(systems())
    assert {name for name in presets if not re.search(rf"[` ]{name}\b", page)} == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    pytest.importorskip("material", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert (site / "index.html").is_file()
    # Pages from outside of docs/, and the source files that pages link to.
    assert (site / "benchmarks/quality.html").is_file()
    assert (site / "source/trainer/engine/loop.py.html").is_file()
    assert "generated:" not in (site / "reference/configuration.html").read_text()
    assert "generated:" not in (site / "reference/troubleshooting.html").read_text()


def test_no_link_of_the_site_leads_nowhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if page.name != "404.html" and not re.match(r"[a-z]+:", link):
                target = (page.parent / html.unescape(link)).resolve()
                assert target.exists(), f"{page.relative_to(site)}: {link}"


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:link|script|img)[^>]*(?:href|src)="(https?:[^"]*)"', page.read_text())
        assert loaded == [], page.relative_to(site)
