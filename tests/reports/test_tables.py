"""The comparison table: its numbers, computed by hand, and its layout."""

from __future__ import annotations

from typing import Any

import pytest
from report_helpers import result

from trainer.evaluation.ranking import Estimate
from trainer.reports.tables import WIDTH, comparison, differences

METRICS = ("NDCG@10", "HR@10")


def line_of(table: str, start: str) -> str:
    (line,) = (line for line in table.split("\n") if line.startswith(start))
    return line


def test_a_table_of_two_systems() -> None:
    results = [
        result(0.2918, "SASRec"),
        result(0.2688, "SASRec", history="shuffled"),
        result(0.3388),
        result(0.3470, history="shuffled"),
        result(0.2585, "TALLRec"),
    ]
    # (0.2688 - 0.2918) / 0.2918 = -7.88 %; (0.3470 - 0.3388) / 0.3388 = +2.42 %.
    # Chance among 100: NDCG@10 0.0454, HR@10 0.1.
    assert comparison(results, METRICS) == (
        "Scientific · test split · 100 sampled candidates\n"
        "\n"
        "                    ─────────── NDCG@10 ────────────  ──────────── HR@10 ─────────────\n"
        "system       users        original shuffled   change        original shuffled   change\n"
        "SASRec      27,601  0.2918 ±0.0030   0.2688   -7.9 %  0.5836 ±0.0030   0.5376   -7.9 %\n"
        "LLM-SRec    27,601  0.3388 ±0.0030   0.3470   +2.4 %  0.6776 ±0.0030   0.6940   +2.4 %\n"
        "TALLRec     27,601  0.2585 ±0.0030        -        -  0.5170 ±0.0030        -        -\n"
        "chance              0.0454                            0.1000\n"
        "\n"
        "±: half the 95 % bootstrap interval over users. change: shuffled against original history.\n"
    )


def test_long_labels_are_cut_only_while_they_stay_apart() -> None:
    def labels(*runs: str) -> list[str]:
        lines = comparison([result(0.3, "S", run=run) for run in runs], ("HR@10",)).split("\n")
        return [line.split("  ")[0] for line in lines if line.startswith("S (")]

    assert labels("a_rather_long_name_1", "a_rather_long_name_2") == ["S (a_rathe…g_name_1)", "S (a_rathe…g_name_2)"]
    assert labels("the_same_or_1_of_both", "the_same_or_2_of_both") == [
        "S (the_same_or_1_of_both)",
        "S (the_same_or_2_of_both)",
    ]


def test_markdown() -> None:
    results = [result(0.4, "A|B"), result(0.3, "A|B", history="shuffled")]
    # (0.3 - 0.4) / 0.4 = -25 %
    assert comparison(results, ("HR@10",), "markdown") == (
        "**Scientific · test split · 100 sampled candidates**\n"
        "\n"
        "| system | users | HR@10 | shuffled | change |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| A\\|B | 27,601 | 0.8000 ±0.0030 | 0.6000 | -25.0 % |\n"
        "| chance |  | 0.1000 |  |  |\n"
        "\n"
        "±: half the 95 % bootstrap interval over users. change: shuffled against original history.\n"
    )


def test_no_line_is_wider_than_the_terminal() -> None:
    metrics = {name: Estimate(0.5, 0.4, 0.6) for name in ("NDCG@10", "HR@10", "NDCG@20", "HR@20")}
    results = [
        result(0.3, "LLM-SRec with a long name", run=f"electronics-seed-{seed}", metrics=metrics, users=9_876_543)
        for seed in range(3)
    ]
    table = comparison(results)
    assert max(map(len, table.split("\n"))) <= WIDTH
    # Both halves of each panel, and what tells the runs apart, are present.
    assert table.count("seed-2)") == 2
    assert all(f" {name} " in table for name in metrics)


def test_runs_of_one_system_are_told_apart() -> None:
    table = comparison([result(0.3, run="a"), result(0.2, run="b"), result(0.1, "SASRec", run="c")], METRICS)
    assert "0.3000" in line_of(table, "LLM-SRec (a)")
    assert "0.2000" in line_of(table, "LLM-SRec (b)")
    assert line_of(table, "SASRec ")


def test_only_the_newest_result_counts() -> None:
    older = result(0.1, created="2025-03-08T11:59:59+00:00")
    assert "0.3000" in line_of(comparison([result(0.3), older], METRICS), "LLM-SRec")


def test_a_shuffled_result_alone_and_an_original_of_0_have_no_change() -> None:
    table = comparison([result(0.3, history="shuffled")], METRICS)
    assert line_of(table, "LLM-SRec").split()[1:5] == ["27,601", "-", "0.3000", "-"]
    table = comparison([result(0.0), result(0.3, history="shuffled")], METRICS)
    assert line_of(table, "LLM-SRec").split()[2:6] == ["0.0000", "±0.0030", "0.3000", "-"]


def test_histories_measured_on_different_users_are_marked() -> None:
    table = comparison([result(0.3), result(0.2, history="shuffled", users=10_000)], METRICS)
    assert " 27,601* " in line_of(table, "LLM-SRec")
    assert table.endswith("* LLM-SRec: the shuffled history was measured on 10,000 users.\n")


def test_what_cannot_be_compared_gets_separate_tables() -> None:
    results = [
        result(0.3),
        result(0.3, dataset_fingerprint="ffff"),
        result(0.3, split="valid"),
        result(0.3, candidates="full", num_candidates=None),
        result(0.3, num_candidates=20),
        result(0.3, tie="optimistic"),
    ]
    titles = [line for line in comparison(results, METRICS).split("\n") if " split " in line]
    assert titles == [
        "Scientific · data 9f2c · test split · 100 sampled candidates",
        "Scientific · data ffff · test split · 100 sampled candidates",
        "Scientific · data 9f2c · valid split · 100 sampled candidates",
        "Scientific · data 9f2c · test split · items of the full catalog",
        "Scientific · data 9f2c · test split · 20 sampled candidates",
        "Scientific · data 9f2c · test split · 100 sampled candidates · optimistic ties",
    ]


def test_chance_needs_the_number_of_candidates() -> None:
    assert "chance " not in comparison([result(0.3, candidates="full", num_candidates=None)], METRICS)
    # Among 20 candidates HR@10 is 10/20.
    assert line_of(comparison([result(0.3, num_candidates=20)], ("HR@10",)), "chance").split() == [
        "chance",
        "0.5000",
    ]


def test_a_metric_without_a_chance_level_leaves_its_cell_empty() -> None:
    metrics = {"cosine": Estimate(0.7, 0.6, 0.8), "MRR": Estimate(0.5, 0.4, 0.6)}
    # MRR among 2 candidates: (1 + 1/2) / 2 = 0.75.
    table = comparison([result(0.3, metrics=metrics, num_candidates=2)], ("cosine", "MRR"))
    assert line_of(table, "chance").split() == ["chance", "0.7500"]


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="no results"):
        comparison([])
    with pytest.raises(ValueError, match=r"no result has HR@7; available metrics: NDCG@10, HR@10"):
        comparison([result(0.3)], ("HR@7", "HR@10"))
    with pytest.raises(ValueError, match="at least one metric"):
        comparison([result(0.3)], ())


def test_systems_that_go_beyond_their_paper_are_marked() -> None:
    extended: dict[str, Any] = {
        "run": "llm_srec_128",
        "system": "llm_srec",
        "extensions": ("system.max_vector_items=118",),
    }
    rows = [result(0.3, "llm_srec"), result(0.4, **extended), result(0.35, history="shuffled", **extended)]
    table = comparison(rows, METRICS)
    assert line_of(table, "llm_srec_128 †").split()[3] == "0.4000"
    assert line_of(table, "llm_srec   ").split()[2] == "0.3000"
    assert line_of(table, "† ") == "† llm_srec_128: goes beyond the paper with system.max_vector_items=118."
    assert "| llm_srec_128 † |" in comparison(rows, METRICS, "markdown")


def test_differences_to_other_runs() -> None:
    found = {
        "sasrec": Estimate(0.05, 0.01, 0.09),
        "popularity": Estimate(-0.2, -0.25, -0.15),
        "ctrl": Estimate(0.01, -0.01, 0.03),
    }
    lines = differences("llm_srec", found, "NDCG@10").splitlines()
    assert lines[0].startswith("NDCG@10 of llm_srec minus that of each other run, over the same users")
    assert lines[2:] == [
        "sasrec      +0.0500  [+0.0100, +0.0900]",
        "popularity  -0.2000  [-0.2500, -0.1500]",
        "ctrl        +0.0100  [-0.0100, +0.0300]",
        "",
        "llm_srec is better than sasrec; worse than popularity; not distinguishable from ctrl.",
    ]
    assert "| sasrec | +0.0500 | [+0.0100, +0.0900] |" in differences("llm_srec", found, "NDCG@10", "markdown")
