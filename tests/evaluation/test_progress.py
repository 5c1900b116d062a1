"""Progress of an evaluation."""

from __future__ import annotations

import logging
import time

import pytest

from trainer.evaluation.progress import Progress


def test_a_log_line_every_half_minute_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logging.getLogger("trainer").propagate = True
    with caplog.at_level(logging.INFO, "trainer"), Progress("encoding items", 1000) as progress:
        for _ in range(6):
            now += 11
            progress.add(100)
        progress.add(900)  # the last batch of several ranks may count too much
    assert [record.message for record in caplog.records] == [
        "encoding items: 300 of 1,000, ETA 1:17",
        "encoding items: 600 of 1,000, ETA 0:44",
    ]


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "trainer"), Progress("ranking users", 10, enabled=False) as progress:
        now += 99
        progress.add(5)
    assert not caplog.records
