"""The command `llm-srec`: its help page, its subcommands, its errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest

from launchers import cli

Call = Callable[..., tuple[int, str, str]]

# As on a login node: these cannot be imported.
WITHOUT_TORCH = (
    "import sys; sys.modules |= dict.fromkeys(['torch', 'deepspeed', 'transformers', 'polars']); "
    "from launchers.cli import main; main()"
)


@pytest.fixture(autouse=True)
def _stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command leaves by an exception: with torch imported, it would end this process at once."""
    monkeypatch.setattr(cli, "exit_process", sys.exit)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command in this process; returns its exit code and what it printed."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        with patch.object(sys, "argv", ["llm-srec", *map(str, words)]), pytest.raises(SystemExit) as left:
            cli.main()
        assert isinstance(left.value.code, int)
        return left.value.code, *capsys.readouterr()

    return run


def test_the_help_page_has_a_line_for_each_subcommand(call: Call) -> None:
    code, page, err = call("--help")
    assert (code, err) == (0, "")
    lines = [line.split()[0] for line in page.split("options:")[0].splitlines() if line.startswith("  ")]
    assert lines == list(cli.MODULES)
    assert max(map(len, page.splitlines())) <= 100
    assert call() == call("-h") == (0, page, "")


def test_the_version(call: Call) -> None:
    assert call("--version") == (0, f"llm-srec {version('llm-srec-trainer')}\n", "")


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        ("trian", "did you mean 'train'?"),
        ("evalute", "did you mean 'evaluate'?"),
        ("title_store", "did you mean 'title-store'?"),
        ("--hepl", "one of: shards, "),
        ("xyz", "one of: shards, "),
    ],
)
def test_a_mistyped_subcommand(call: Call, word: str, cure: str) -> None:
    code, out, err = call(word, "sasrec")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: unknown subcommand '{word}' ({cure}")
    assert err.count("\n") == 1


def test_exit_codes_and_errors_are_those_of_the_commands(call: Call, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert call("shards", "verify", missing)[0] == 2  # which returns its code
    assert call("report", missing)[2].count("error: ") == 1
    code, _, err = call("train", missing)  # which raises
    assert code == 2
    assert err.startswith(f"error: no such file: {missing} ")


@pytest.mark.process
@pytest.mark.parametrize("words", [[], ["trian"], *([name, "--help"] for name in cli.MODULES)], ids=" ".join)
def test_nothing_heavy_is_imported_before_there_is_work(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if words == ["trian"] else 0), done.stderr
    # Names in usage are those that were typed.
    assert "--help" not in words or done.stdout.startswith(f"usage: llm-srec {words[0]} [-h]")


@pytest.mark.parametrize("module", cli.MODULES.values())
def test_a_script_shows_its_own_name(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        import_module(module).main(["--help"])
    name = "python -m shards" if module == "shards.__main__" else f"{module.rpartition('.')[2]}.py"
    assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["train", "sasrec", "--lr=3e-4"], "unrecognized arguments: --lr=3e-4: write train.lr=3e-4, without dashes"),
        (["train", "sasrec", "--train.batch-size", "8"], "write train.batch_size=VALUE, without dashes"),
        (["compare", "llara", "--max_history=5"], "write system.max_history=5, without dashes"),
        (["train"], "the following arguments are required: preset, section.key=value"),
        (
            ["report", "runs/a", "--frobnicate"],
            "unrecognized arguments: --frobnicate (options: llm-srec report --help)",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], cure: str, capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(sys, "argv", ["llm-srec", *words]), pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert cure in line
