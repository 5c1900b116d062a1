"""Results of a run folder: those of one task, of a run that was tested on both."""

from __future__ import annotations

from pathlib import Path

from helpers import sasrec_config, write_config
from report_helpers import result

from trainer.reports.page.run_record import read_run
from trainer.reports.results import RESULTS_FILE, append


def test_results_of_the_other_task_do_not_count(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", sasrec_config(tmp_path / "data", tmp_path))
    retrieval = result(0.4, created="2026-01-01T00:00:00+00:00")
    generation = result(0.9, task="generation", created="2026-01-02T00:00:00+00:00")
    for each in (retrieval, generation):
        append(tmp_path / RESULTS_FILE, each)
    assert read_run(tmp_path, "SASRec", "test", "sampled").original == retrieval
    assert read_run(tmp_path, "SASRec", "test", "sampled", "generation").original == generation
