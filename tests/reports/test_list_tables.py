"""The table of metrics beyond accuracy, and the leak warning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from report_helpers import result

from trainer.evaluation.ranking import Estimate
from trainer.reports.list_tables import beyond_accuracy
from trainer.reports.results import Result


def with_lists(system: str, values: Mapping[str, float], history: str = "original") -> Result:
    of = result(0.3, system, history=history, later_training=0.49)
    estimates = {name: Estimate(value, value, value) for name, value in values.items()}
    return replace(of, metrics={**of.metrics, **estimates}, totals={"coverage@10": 0.755})


def test_jaccard_comes_from_the_shuffled_history_and_all_else_from_the_original() -> None:
    original = with_lists("SASRec", {"ARP@10": 1234.5, "APLT@10": 0.25, "MIUF@10": 5.0})
    shuffled = with_lists("SASRec", {"ARP@10": 7.0, "APLT@10": 0.5, "MIUF@10": 9.0, "Jaccard@10": 0.24}, "shuffled")
    text = beyond_accuracy([original, shuffled, result(0.2, "popularity")])
    header, row, *_ = text.strip().splitlines()
    assert header.split() == ["lists", "of", "10", "coverage@10", "ARP@10", "APLT@10", "MIUF@10", "Jaccard@10"]
    assert row.split() == ["SASRec", "0.755", "1,234.5", "0.250", "5.000", "0.240"]
    assert "popularity" not in text, "it has no lists"
    markdown = beyond_accuracy([original, shuffled], "markdown")
    assert "| SASRec | 0.755 | 1,234.5 | 0.250 | 5.000 | 0.240 |" in markdown


def test_the_leak_is_warned_of_once_per_dataset() -> None:
    text = " ".join(beyond_accuracy([with_lists("SASRec", {}), with_lists("GRU4Rec", {})]).split())  # lines are wrapped
    assert text.count("warning: 49 % of the training events of Scientific are later than the median test event") == 1
    temporal = replace(with_lists("SASRec", {}), later_training=0.0)
    assert "warning" not in beyond_accuracy([temporal])


def test_results_without_lists_have_no_table() -> None:
    assert beyond_accuracy([result(0.3)]) == ""
