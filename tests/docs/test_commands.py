"""Every command, key, path and code block in the documentation is valid."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from config_reference import keys, systems
from doc_commands import Command, blocks, check, command_lines, measurements, option_strings, pages
from helpers import ROOT

from launchers.cli import MODULES
from trainer.config import RunConfig

COMMANDS = [command for page in [*pages(), *measurements()] for command in command_lines(page)]
PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
RECIPE = ROOT / "CONTRIBUTING.md"
"""Its blocks are files that do not exist yet, and tests/models/test_recipe.py writes and runs them."""


@cache
def every_key() -> frozenset[str]:
    """Every configuration key, and the sections that hold them."""
    names = {key.name for key in keys(RunConfig)}
    names |= {key.name for model in systems().values() for key in keys(model, "system.")}
    return frozenset(names | {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2)})


def inline(page: Path) -> list[str]:
    """Code within the text of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_valid(command: Command) -> None:
    check(command.words)


def test_invalid_commands_are_found() -> None:
    for words, why in {
        "llm-srec trian sasrec": "no subcommand trian",
        "llm-srec train sasrec train.lrr=1": "unknown key 'train.lrr'",
        "llm-srec train sasrek": "no such file: sasrek",
        "llm-srec evaluate runs/a --candidate-set full": "unrecognized arguments: --candidate-set full",
        "llm-srec report runs/a --split tset": "invalid choice: 'tset'",
        "python -m shards build out --surce table": "unrecognized arguments: --surce table",
        "deepspeed launchers/train.py llm_srec system.llm.layer=3": "unknown key 'system.llm.layer'",
        "llm-srec compare sasrec gru4rec system.dimm=3 output=runs/a": "dimm",
        "llm-srec submit a6000 --experiment table33 --data data/a": "no experiment table33",
        "python launchers/trian.py sasrec": "no script launchers/trian.py",
        "make tset": "no target tset",
        "lm-srec train": "'lm-srec' is neither",
    }.items():
        with pytest.raises(ValueError, match=re.escape(why)):
            check(words.split())


@PAGES
def test_every_block_names_its_language(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"sh", "python", "yaml", "text"}, "commands are `sh`, output is `text`"
    assert set(fences[1::2]) <= {""}


@PAGES
def test_python_and_yaml_blocks_can_be_read(page: Path) -> None:
    for block in blocks(page.read_text(), "python") if page != RECIPE else []:
        compile(block, str(page), "exec", dont_inherit=True)
    for block in blocks(page.read_text(), "yaml"):
        assert yaml.safe_load(block)


@PAGES
def test_commands_in_the_text_exist_with_their_options(page: Path) -> None:
    for code in inline(page):
        if found := re.match(r"llm-srec ([a-z][\w-]*)", code):
            assert found[1] in MODULES, code
            options = option_strings(MODULES[found[1]])
            assert {word.partition("=")[0] for word in code.split() if word.startswith("--")} <= options, code


@PAGES
def test_keys_exist(page: Path) -> None:
    for code in [*inline(page), *blocks(page.read_text(), "sh")]:
        for name in re.findall(r"(?<![\w./-])((?:data|train|system|evaluation|engine)\.[a-z][\w.]*)(?![\w/])", code):
            if not name.endswith((".py", ".yaml", ".md")):
                assert name.rstrip(".") in every_key(), name


@PAGES
def test_files_exist(page: Path) -> None:
    folders = "trainer|shards|launchers|benchmarks|tests|ds_configs|requirements|docs|examples"
    for code in inline(page) if page != RECIPE else []:
        if re.fullmatch(rf"(?:{folders})/[\w./-]*", code):
            assert (ROOT / code).exists(), code
