"""Runs as shown by TensorBoard's own server, and by its pages in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch
from browser_helpers import headless_browser
from helpers import llm_srec_config, sasrec_config

from trainer.config import parse_config
from trainer.engine.recording.board import MAX_DIMENSIONS, add_items, add_test, open_board, percent, tag

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of two runs of a sweep, one of which resumed from step 2 after it had reached step 3, and a test."""
    folder = tmp_path_factory.mktemp("board")
    for name, lr in (("slow", 1e-4), ("fast", 1e-2)):
        run = folder / "sweep" / name
        config = parse_config(sasrec_config(Path("data"), run, lr=lr), "test")
        for first, last in ((0, 3), (2, 4)) if name == "fast" else ((0, 4),):
            board = open_board(run, config, done_steps=first)
            for step in range(first + 1, last + 1):
                board.add_scalar(tag("speed/goodput", "sasrec"), 1.0, step)
                board.add_scalar(tag("train/loss", "sasrec"), 1 / step, step)
                if (first, step) != (2, 3):  # once resumed, it does not validate at step 3
                    board.add_scalar("valid/HR@10", lr * step, step)
            if name == "fast" and first:
                add_test(board, {"original": {"HR@10": 0.5}, "shuffled": {"HR@10": 0.25}}, 4)
                titles = ["rare", "a\tb\n<i>c</i>", "popular", "x"]
                add_items(board, torch.eye(4, MAX_DIMENSIONS + 3), titles, [1, 2, 9, 3], 4)
            board.close()
    # --load_fast=false: the fast loader ignores `purge_step` and shows old points until they are written again.
    options = [f"--logdir={folder}", "--host=127.0.0.1", "--port=0", "--load_fast=false"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        yield next(found[0] for line in server.stderr if (found := re.search(r"http://\S+?:\d+/", line)))
        server.terminate()


@pytest.fixture(scope="module")
def ask(address: str) -> Ask:
    """Queries the server, once it has read everything."""
    direct = build_opener(ProxyHandler({}))

    def answer(path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with direct.open(Request(address + path, data, {"Content-Type": "application/json"}), timeout=60) as found:
            return json.load(found)

    end = time.monotonic() + 60
    while len(answer("data/plugin/text/tags")) < 2:  # it answers before it has read everything
        assert time.monotonic() < end
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_browser() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which no script may fail."""
    problems: list[str] = []
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert problems == []


@pytest.mark.process
def test_runs_are_named_after_their_folders(ask: Ask) -> None:
    assert sorted(ask("data/runs")) == ["sweep/fast", "sweep/slow"]


def test_the_best_and_the_training_come_first(ask: Ask) -> None:
    """TensorBoard sorts groups by name."""
    tags = ["best/test HR@10", "best/test HR@10 shuffled", "train/loss [sasrec]", "valid/HR@10", "work/goodput"]
    assert sorted(ask("data/plugin/scalars/tags")["sweep/fast"]) == tags


def test_numbers_of_one_scale_share_a_chart_and_others_have_one_per_system() -> None:
    for name, shown in (
        ("train/lr", "train/lr"),
        ("valid/MRR", "valid/MRR"),
        ("memory/peak_gib", "work/memory_peak_gib"),
    ):
        assert tag(name, "sasrec") == tag(name, "llm_srec") == shown
    for name in ("train/loss", "train/grad_norm", "speed/users_per_second"):
        assert tag(name, "sasrec") != tag(name, "llm_srec")


@pytest.mark.parametrize("total", [7, 96, 100, 1080])
def test_the_percent_of_a_run_survives_a_resume(total: int) -> None:
    """`purge_step` hides points above the step that a run resumes from."""
    assert percent(total, total) == min(total, 100)
    assert all(percent(step, total) <= step for step in range(total + 1))


def test_the_layout_has_charts_of_the_tokens_of_llm_systems_alone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    trees = sasrec_config(Path("data"), tmp_path), llm_srec_config(Path("data"), tmp_path, Path("t"), Path("llm"))
    titles = []
    for number, tree in enumerate(trees):
        open_board(tmp_path / str(number), parse_config(tree, "test"), done_steps=0).close()
        board = EventAccumulator(str(tmp_path / str(number)))
        board.Reload()
        [event] = board.Tensors("custom_scalars__config__")
        layout = Layout.FromString(event.tensor_proto.string_val[0])
        titles.append([chart.title for category in layout.category for chart in category.chart])
    assert not [title for title in titles[0] if "tokens" in title]
    assert [title for title in titles[1] if "tokens" in title] == ["LLM tokens per second (llm_srec)"]
    assert set(titles[0]) & set(titles[1]) == {
        "validation", "validation, over the percent of each run", "peak memory, GiB", "goodput",
    }  # fmt: skip


def test_the_test_is_shown_original_beside_shuffled(ask: Ask) -> None:
    (text,) = ask("data/plugin/text/text?run=sweep/fast&tag=test/text_summary")
    assert "<td>HR@10</td>\n<td>0.5000</td>\n<td>0.2500</td>" in text["text"]


@pytest.mark.process
def test_custom_charts_hold_the_curves_of_both_runs(ask: Ask, address: str, page: Page) -> None:
    page.goto(address + "#custom_scalars")
    chart = page.locator("tf-custom-scalar-multi-line-chart-card", has_text="loss and its parts (sasrec)")
    chart.locator("path.line-plot, .line-plot path, g.plot path").first.wait_for(state="attached", timeout=60_000)
    chart.get_by_text("Matches (2)").wait_for(state="attached", timeout=60_000)


@pytest.mark.process
def test_the_projector_shows_items_with_titles_and_popularity(ask: Ask, address: str, page: Page) -> None:
    assert ask("data/plugin/projector/runs") == ["sweep/fast"]
    page.goto(address + "#projector")
    frame = page.frame_locator("iframe").frame_locator("iframe")
    count = frame.locator(".numDataPoints")
    count.filter(has_text="4").wait_for(timeout=60_000)


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
    found = {
        group["hparams"]["train.lr"]: value["value"]
        for group in groups
        for value in group["metricValues"]
        if value["name"]["tag"] == "valid/HR@10"
    }
    assert found == {1e-4: pytest.approx(4e-4), 1e-2: pytest.approx(4e-2)}


def test_settings_that_differ_are_the_first_columns(ask: Ask) -> None:
    found = ask("experiment/defaultExperimentId/data/plugin/hparams/experiment", {"experimentName": ""})
    first = [column["name"] for column in found["hparamInfos"] if column["differs"]]
    assert first == ["train.lr"] == [column["name"] for column in found["hparamInfos"]][:1]
    assert found["metricInfos"][0]["name"]["tag"].startswith("best/")
