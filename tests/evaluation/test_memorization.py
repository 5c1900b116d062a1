"""Whether a language model knows a catalog by heart: the questions, their control, and a real model that does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import run_command

from trainer.data.raw.items import RawItems
from trainer.evaluation.memorization import BEYOND_CONTROL, BY_ID, BY_OTHER_ID, SECOND_HALF, probe

ITEMS = RawItems(tuple(f"b{n}" for n in range(40)), (*(f"The film number {n}" for n in range(39)), "Up"))


def knows_all(prompts: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Answers of a model that has seen the catalog, with a further column."""
    by_id = dict(zip(ITEMS.ids, ITEMS.titles, strict=True))
    answers = []
    for prompt, title in zip(prompts, expected, strict=True):
        *shots, line = prompt.split("\n")
        assert len(shots) == 3
        assert not [shot for shot in shots if shot == line + title]
        answers.append(by_id[line.removesuffix("::")].upper() + "::Drama" if line.endswith("::") else " number 7")
    return answers


def test_a_model_that_knows_all_titles_by_their_ids() -> None:
    found = probe(ITEMS, knows_all, 500, shots=3)
    assert len(found.right_I[BY_ID]) == 37, "all but the shots"
    shares = {name: share.value for name, share in found.shares().items()}
    assert (shares[BY_ID], shares[BY_OTHER_ID], shares[BEYOND_CONTROL]) == (1, 0, 1)
    assert found.knows_ids()
    assert len(found.right_I[SECOND_HALF]) in (36, 37), "a title of one word has no second half"
    assert found.right_I[SECOND_HALF].sum() <= 1


def test_a_model_that_guesses_one_title_knows_no_ids() -> None:
    def guesses(prompts: Sequence[str], expected: Sequence[str]) -> list[str]:
        return ["The film number 3"] * len(prompts)

    found = probe(ITEMS, guesses, 40, shots=1)
    shares = found.shares()
    assert shares[BY_ID].value == pytest.approx(shares[BY_OTHER_ID].value)
    assert not found.knows_ids()


def test_a_catalog_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="40 items, too few to show 39"):
        probe(ITEMS, knows_all, 5, shots=39)


@pytest.mark.process
def test_the_command_with_a_random_model(tiny_llm: Path, world: Path) -> None:
    words = ("launchers/memorization.py", tiny_llm, "--data", world, "--items", "8", "--dtype", "float32", "--json")
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["items"], found["knows_ids"]) == (8, False)
    for wrong, message in (
        ((tiny_llm, "--data", world, "--shots", "0"), "--shots 0: give at least 1"),
        ((world, "--data", world), f"LLM={world}"),
        ((tiny_llm, "--data", tiny_llm), "is not a dataset"),
    ):
        done = run_command("launchers/memorization.py", *wrong)
        assert done.returncode == 2
        assert message in done.stderr
