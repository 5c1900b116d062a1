"""The fault matrix: which cells a command chooses, and that the page shows its results."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.machine import RESULTS
from benchmarks.faults import chosen, matrix, table


def test_the_page_shows_the_results_of_every_cell() -> None:
    result = json.loads((RESULTS / "faults.json").read_text())
    assert (RESULTS.parent / "faults.md").read_text() == table(result)
    assert set(result["cells"]) == {cell.name for cell in matrix(2)}
    assert not {name: cell["problems"] for name, cell in result["cells"].items() if cell["problems"]}


@pytest.mark.parametrize(
    ("patterns", "count"),
    [(["*"], 90), (["kill"], 10), (["kill/save", "kill/1/*"], 6), (["*/any/end"], 2), (["s*/end"], 6)],
)
def test_cells_are_chosen_by_fault_rank_and_phase(patterns: list[str], count: int) -> None:
    names = [cell.name for cell in chosen(matrix(2), patterns)]
    assert len(set(names)) == len(names) == count


def test_a_pattern_of_no_cell_is_refused() -> None:
    with pytest.raises(SystemExit, match="no cell is called kil; one is kill/0/start"):
        chosen(matrix(2), ["kill", "kil"])
