"""Commands in the documentation, parsed by the real parsers of the commands without running anything."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from helpers import ROOT

from launchers.cli import MODULES
from launchers.command import CommandParser
from trainer.config import load_config
from trainer.config.presets import find_in
from trainer.workflows.comparing.comparison import compared_runs

SCRIPTS = {f"launchers/{module.split('.', 1)[1].replace('.', '/')}.py": module for module in MODULES.values()}
"""Scripts of the repository, and the modules with their `main`."""
SCRIPTS["launchers/demo_models.py"] = "launchers.demo_models"

ELSEWHERE = frozenset({"apptainer", "cd", "curl", "docker", "git", "pip", "python3", "tensorboard", "."})
"""First words of commands that are not ours: not checked."""


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


class _Parsed(BaseException):
    """Carries the parsed options out of a command's `main`, before it does anything."""

    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        super().__init__()
        self.parser, self.options = parser, options


def pages() -> list[Path]:
    """Every page of the documentation in the repository."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ds_configs/README.md")]
    return found + sorted((ROOT / "docs").glob("**/*.md"))


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def measurements() -> list[Path]:
    """Pages of benchmarks, whose commands are indented."""
    return sorted((ROOT / "benchmarks").glob("**/*.md"))


def command_lines(page: Path) -> Iterator[Command]:
    """Yield the commands of a page's `sh` blocks, and its indented ones."""
    name = page.relative_to(ROOT).as_posix()
    text = page.read_text()
    indented = re.findall(r"^    ((?:python|llm-srec|deepspeed|make) (?:.*\\\n)*.*\n)", text, re.MULTILINE)
    for block in [*blocks(text, "sh"), *indented]:
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables before a command
                    del words[0]
                if words:
                    yield Command(name, tuple(words))


def check(words: Sequence[str]) -> None:
    """Parse a command; one of ours must be valid, with a preset that exists and keys that its system has.

    Raises:
        ValueError: it is not valid, or unknown.
    """
    match list(words):
        case ["make", target]:
            _check(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {target}")
        case ["llm-srec", "--help" | "--version"]:
            pass
        case ["llm-srec", subcommand, *rest]:
            _check(subcommand in MODULES, f"no subcommand {subcommand}")
            _check_options(MODULES[subcommand], rest)
        case ["python", "-m", "shards", *rest]:
            _check_options("shards.__main__", rest)
        case ["python", "-m", module, *_] if module.startswith("benchmarks"):
            _check((ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"no module {module}")
        case ["python", "-c", code]:
            compile(code, "<command>", "exec")
        case ["sbatch", option, *rest] if option.startswith("-"):  # of Slurm
            check(["sbatch", *rest])
        case ["python" | "sbatch" | "bash", script, *rest]:
            _check((ROOT / script).is_file(), f"no script {script}")
            if script == "launchers/slurm/shards.sbatch":
                _check_options("shards.__main__", ["build", *rest])
            elif script in SCRIPTS:
                _check_options(SCRIPTS[script], rest)
        case ["deepspeed", *rest]:
            _check_options("launchers.train", _without_launcher(rest))
        case [first, *_]:
            _check(first in ELSEWHERE, f"'{first}' is neither a command of ours nor one of {sorted(ELSEWHERE)}")


def option_strings(module: str, words: Sequence[str] = ()) -> set[str]:
    """Options of a command, those of its subcommands included."""
    parser = _parse(module, words, reach_parser=True).parser
    found = set()
    waiting = [parser]
    while waiting:
        for action in waiting.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return found


def _without_launcher(words: Sequence[str]) -> list[str]:
    """The arguments of `launchers.train` in those of the deepspeed launcher."""
    rest = list(words)
    while rest and rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--num_gpus", "--num_nodes", "--hostfile"):
            rest.pop(0)
        else:
            _check(option in ("--module", "--quiet"), f"unknown option {option} of deepspeed")
    _check(rest and rest[0] in ("launchers/train.py", "launchers.train"), "deepspeed starts launchers/train.py")
    return rest[1:]


def _check_options(module: str, words: Sequence[str]) -> None:
    options = vars(_parse(module, words).options)
    if module == "launchers.compare":
        # Only their names and settings: what they build on need not exist.
        overrides = [word for word in options["words"] if "=" in word]
        compared_runs([Path(word) for word in options["words"] if "=" not in word], overrides, options["sweep"])
    elif options.get("preset") is not None:
        load_config(options["preset"], options["overrides"])
    for folder, key in (("experiments", "name"), ("experiments", "experiment"), ("recipes", "recipe")):
        name = options.get(key)
        if isinstance(name, Path) and not name.suffix and "data" in options:
            _check(find_in(folder, name).is_file(), f"no {folder[:-1]} {name}")  # type: ignore[arg-type]


def _parse(module: str, words: Sequence[str], *, reach_parser: bool = False) -> _Parsed:
    """Call a command's `main` until it has parsed its arguments; with `reach_parser` without parsing them."""

    def leaves(known: str) -> Callable[..., NoReturn]:
        def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
            if reach_parser:
                raise _Parsed(self, argparse.Namespace())
            options, unknown = getattr(self, known)(args, namespace)
            if unknown:
                self.error(f"unrecognized arguments: {' '.join(unknown)}")
            raise _Parsed(self, options)

        return parse

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")

    stopping: dict[str, Any] = {
        "parse_args": leaves("parse_known_args"),
        "parse_intermixed_args": leaves("parse_known_intermixed_args"),
        "error": error,
    }
    with patch.multiple(argparse.ArgumentParser, **stopping), patch.object(CommandParser, "error", error):
        try:
            import_module(module).main([expanded for word in words for expanded in _expanded(word)])
        except _Parsed as parsed:
            return parsed
    raise AssertionError(f"{module}.main returned without parsing its arguments")


def _expanded(word: str) -> list[str]:
    """Braces as a shell expands them."""
    if braces := re.fullmatch(r"(.*)\{([\w,]+)\}(.*)", word):
        return [braces[1] + choice + braces[3] for choice in braces[2].split(",")]
    return [word]


def _check(true: object, message: str) -> None:
    if not true:
        raise ValueError(message)
