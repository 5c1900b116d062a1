"""The committed page of predictions has all rows, and those of the planner."""

from __future__ import annotations

from pathlib import Path

from benchmarks.predicted import DEVICES, PAGE, SIZES, SYSTEMS, Predictor, page_with


def test_the_page_has_a_row_for_each_system_and_llm() -> None:
    lines = PAGE.read_text().splitlines()
    for llm in SIZES:
        for system in SYSTEMS:
            (row,) = [line for line in lines if line.startswith(f"| {llm.rpartition('-')[2]} | {system} |")]
            assert row.count("|") == 3 + len(DEVICES)


def test_a_row_of_the_page_is_what_the_planner_predicts(tmp_path: Path) -> None:
    """One row stands for all, each of which takes a second."""
    row = Predictor.write(tmp_path).row("LLM-SRec", "Llama-3.2-3B")
    assert row in PAGE.read_text().splitlines(), "run `python -m benchmarks.predicted --write`"


def test_only_the_table_is_replaced() -> None:
    page = PAGE.read_text()
    once = page_with(page, "new")
    assert page_with(once, "new") == once
    assert once.startswith("# Predicted")
    assert "How far to trust them" in once
