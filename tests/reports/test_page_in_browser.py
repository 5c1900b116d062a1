"""A page in a real browser: it loads nothing, sorts, fits a phone, follows the dark theme and prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser_helpers import headless_browser

from trainer.evaluation.ranking import Estimate
from trainer.reports.page.content import Answer, Case, Cases, Figure, File, Page, Section, Table
from trainer.reports.page.figures import Line, Span, interval_chart, line_chart
from trainer.reports.page.render import render

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.process

HOSTILE = "<img src=http://127.0.0.1:9/x onerror=document.title='broken'><script>document.title='broken'</script>"
FIGURE = Figure(
    (
        line_chart("loss", [Line(0, range(20), [1 / (1 + x) for x in range(20)])], "step"),
        interval_chart("NDCG@10", [Span("a", 0, Estimate(0.3, 0.2, 0.4), Estimate(0.2, 0.1, 0.3))], 0.05),
    ),
    (("a", 0),),
)
CASE = Case(
    "7", "largest gain", (("2020-01-01", HOSTILE),), 3, HOSTILE, (Answer("a", 1, 100, ((HOSTILE, True),), True),)
)
TABLE = Table.of(
    ["run", "NDCG@10", *(f"a wide column {number}" for number in range(9))],
    [
        ["nine", 9.0, *["x"] * 9],
        ["ten", 10.0, *["x"] * 9],
        ["none", None, *["x"] * 9],
        ["half", Estimate(0.5, 0.4, 0.6), *["x"] * 9],
    ],
)
PAGE = Page("A page", "of a test", (Section("All", (TABLE, FIGURE, Cases((CASE,)), File("run.yaml", "lr: 1\n" * 9))),))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_browser() as found:
        yield found


@pytest.fixture
def address(tmp_path: Path) -> str:
    (tmp_path / "page.html").write_text(render(PAGE))
    return (tmp_path / "page.html").as_uri()


def test_it_loads_nothing_and_runs_no_foreign_script(browser: Browser, address: str) -> None:
    asked: list[str] = []
    problems: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    assert page.title() == "A page"
    assert page.locator(".history .target").inner_text().endswith(HOSTILE)
    assert (asked, problems) == ([address], [])
    # A script that were injected all the same would not run.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in problems[0]


def test_a_click_on_a_head_sorts_by_value(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(address)

    def column(number: int) -> list[str]:
        return [cell.split()[0] for cell in page.locator(f"tbody tr > :nth-child({number})").all_inner_texts()]

    page.get_by_role("button", name="NDCG@10").click()
    assert column(1) == ["ten", "nine", "half", "none"]  # what is missing comes last, in both orders
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="NDCG@10").press("Enter")
    assert column(1) == ["half", "nine", "ten", "none"]
    page.get_by_role("button", name="run").click()
    assert column(1) == ["half", "nine", "none", "ten"]


def test_it_fits_a_phone(browser: Browser, address: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 700}, is_mobile=True)
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") == 360  # wide tables scroll on their own
    box = page.locator("svg.chart").first.bounding_box()
    assert box is not None
    assert 300 <= box["width"] <= 360


def test_charts_follow_the_theme(browser: Browser, address: str) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(address)
    colours = []
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        colours.append(
            page.evaluate(
                "['body', 'svg.chart text', 'svg.chart path[style*=series-1]'].map((name) => {"
                "const style = getComputedStyle(document.querySelector(name));"
                "return name === 'body' ? style.backgroundColor : name.includes('text') ? style.fill : style.stroke})"
            )
        )
    assert all(light != dark for light, dark in zip(*colours, strict=True))
    assert colours[0][0] == "rgb(255, 255, 255)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_print_shows_what_is_folded(browser: Browser, address: str, tmp_path: Path) -> None:
    page = browser.new_page()
    page.goto(address)
    assert page.locator("details pre").is_hidden()
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert page.locator("details pre").is_visible()
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
