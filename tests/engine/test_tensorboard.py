"""Runs as shown by TensorBoard's own server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from helpers import sasrec_config

from trainer.config import parse_config
from trainer.engine.metrics import open_board, tag

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Queries a server of two runs of a sweep, one of which resumed from step 2 after it had reached step 3."""
    folder = tmp_path_factory.mktemp("board")
    for name, lr in (("slow", 1e-4), ("fast", 1e-2)):
        run = folder / "sweep" / name
        config = parse_config(sasrec_config(Path("data"), run, lr=lr), "test")
        for first, last in ((0, 3), (2, 4)) if name == "fast" else ((0, 4),):
            board = open_board(run, config, done_steps=first)
            for step in range(first + 1, last + 1):
                board.add_scalar(tag("speed/goodput"), 1.0, step)
                if (first, step) != (2, 3):  # once resumed, it does not validate at step 3
                    board.add_scalar("valid/HR@10", lr * step, step)
            board.close()
    # --load_fast=false: the fast loader ignores `purge_step` and shows old points until they are written again.
    options = [f"--logdir={folder}", "--host=127.0.0.1", "--port=0", "--load_fast=false"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+?:\d+/", line)))

        direct = build_opener(ProxyHandler({}))

        def answer(path: str, body: dict[str, Any] | None = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            with direct.open(Request(address + path, data, {"Content-Type": "application/json"}), timeout=60) as found:
                return json.load(found)

        end = time.monotonic() + 60
        while len(answer("data/plugin/text/tags")) < 2:  # it answers before it has read everything
            assert time.monotonic() < end
            time.sleep(0.1)
        yield answer
        server.terminate()


@pytest.mark.process
def test_runs_are_named_after_their_folders(ask: Ask) -> None:
    assert sorted(ask("data/runs")) == ["sweep/fast", "sweep/slow"]


def test_training_and_validation_tags_come_first(ask: Ask) -> None:
    """TensorBoard sorts groups by name."""
    assert sorted(ask("data/plugin/scalars/tags")["sweep/fast"]) == ["valid/HR@10", "work/goodput"]
    assert tag("memory/peak_gib") == "work/memory_peak_gib"
    assert tag("train/loss") == "train/loss" < tag("valid/MRR") < tag("speed/goodput")


def test_points_before_a_resume_are_hidden(ask: Ask) -> None:
    for name, expected in (("work/goodput", [1, 2, 3, 4]), ("valid/HR@10", [1, 2, 4])):
        points = ask(f"data/plugin/scalars/scalars?run=sweep/fast&tag={name}")
        assert [step for _, step, _ in points] == expected


def test_settings_are_shown_as_text(ask: Ask) -> None:
    assert "config/text_summary" in ask("data/plugin/text/tags")["sweep/slow"]
    (text,) = ask("data/plugin/text/text?run=sweep/slow&tag=config/text_summary")
    assert "  lr: 0.0001\n" in text["text"]


def test_runs_can_be_sorted_by_settings_and_metrics(ask: Ask) -> None:
    body = {
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN"],
        "colParams": [{"metric": {"group": "", "tag": "valid/HR@10"}}],
        "startIndex": 0,
        "sliceSize": 9,
    }
    groups = ask("experiment/defaultExperimentId/data/plugin/hparams/session_groups", body)["sessionGroups"]
    found = {group["hparams"]["train.lr"]: group["metricValues"][0]["value"] for group in groups}
    assert found == {1e-4: pytest.approx(4e-4), 1e-2: pytest.approx(4e-2)}
