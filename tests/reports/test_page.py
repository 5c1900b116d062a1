"""The HTML of a page, and the rule that chooses its cases."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from trainer.evaluation.order.audit import Audit, Change
from trainer.evaluation.ranking import Estimate, Ranks
from trainer.reports.page.audit import page_of_audit
from trainer.reports.page.cases import choose
from trainer.reports.page.content import Case, Cases, Cell, Figure, Page, Section, Table
from trainer.reports.page.figures import Line, Span, interval_chart, line_chart
from trainer.reports.page.render import render
from trainer.reports.user_ranks import UserRanks

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} $x$ &amp;"


class Elements(HTMLParser):
    """All start tags with their attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def ranks(*greater: int, users: list[int] | None = None) -> UserRanks:
    found = np.array(greater)
    user_U = np.array(users if users is not None else range(len(greater)))
    return UserRanks(user_U, Ranks(found, np.zeros_like(found), np.full_like(found, 100)))


def test_hostile_texts_are_shown_as_they_are() -> None:
    case = Case(HOSTILE, HOSTILE, ((HOSTILE, HOSTILE),), 1, HOSTILE, ())
    charts = (
        line_chart(HOSTILE, [Line(0, [1, 2], [1, 2])], HOSTILE),
        interval_chart(HOSTILE, [Span(HOSTILE, 0, None)]),
    )
    blocks = (Table.of([HOSTILE], [[HOSTILE]], title=HOSTILE), Figure(charts, ((HOSTILE, 0),)), Cases((case,), HOSTILE))
    found = Elements(render(Page(HOSTILE, HOSTILE, (Section(HOSTILE, blocks),), verdict=HOSTILE, footer=HOSTILE)))
    assert [tag for tag, _ in found.tags].count("script") == 1  # the page's own
    assert "img" not in {tag for tag, _ in found.tags}
    assert not {name for _, attributes in found.tags for name in attributes if name.startswith("on")}
    assert sum(HOSTILE in text for text in found.text) > 10
    assert "49" not in "".join(found.text).split()  # no template ran in a text


def test_a_page_refers_to_nothing_outside() -> None:
    html = render(Page("t", "s", (Section("Curves", (Figure((line_chart("a", [Line(0, [1], [1])], "x"),)),)),)))
    for _, attributes in Elements(html).tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html


def test_charts_take_the_colours_and_the_font_of_the_page() -> None:
    svg = line_chart("loss", [Line(0, [1, 2], [2, 1]), Line(1, [1, 2], [2, 3])], "step").svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "font-family" not in svg
    assert {"var(--series-1)", "var(--series-2)", "var(--grid)", "var(--muted)"} <= set(
        re.findall(r"var\([^)]*\)", svg)
    )
    assert ">step<" in svg


def test_ids_of_charts_on_one_page_do_not_collide() -> None:
    first, second = (line_chart(title, [Line(0, [1, 2], [2, 1])], "x").svg for title in ("loss", "NDCG@10"))
    ids = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_the_same_runs_give_the_same_bytes() -> None:
    def page() -> Page:
        return Page("t", "s", (Section("a", (Figure((line_chart("a", [Line(0, [1, 2], [2, 1])], "x"),)),)),))

    assert render(page()) == render(page())


def test_cells_keep_the_number_that_their_column_is_sorted_by() -> None:
    table = Table.of(["run", "NDCG@10"], [["a", Estimate(0.25, 0.2, 0.3)], ["b", None]])
    assert table.rows[0][1] == Cell("0.2500 ±0.0500", 0.25)
    assert table.rows[1][1].key is None
    assert table.numeric == (False, True)


def test_cases_are_the_largest_gains_the_largest_losses_and_a_sample() -> None:
    first, second = ranks(0, 50, 10, 10, 90, 3, 4), ranks(40, 0, 10, 30, 10, 3, 4)
    found = choose({"a": first, "b": second}, 2)
    assert [(case.user, case.why) for case in found[:4]] == [
        (0, "largest gain of a over b, number 1"),
        (3, "largest gain of a over b, number 2"),
        (4, "largest loss of a over b, number 1"),
        (1, "largest loss of a over b, number 2"),
    ]
    assert [case.why for case in found[4:]] == ["fixed random sample"] * 2
    assert len({case.user for case in found}) == 6
    assert found == choose({"a": first, "b": second}, 2)


def test_only_users_that_all_runs_ranked_are_cases() -> None:
    found = choose({"a": ranks(0, 0, users=[3, 7]), "b": ranks(9, 9, users=[7, 8])}, 3)
    assert [case.user for case in found] == [7]


@pytest.mark.parametrize("number", [1, 3])
def test_one_run_alone_shows_the_sample(number: int) -> None:
    assert [case.why for case in choose({"a": ranks(1, 2, 3, 4)}, number)] == ["fixed random sample"] * number


def test_the_page_of_an_audit_has_its_numbers() -> None:
    change = Change("all users", "NDCG@10", 10, Estimate(0.4, 0.3, 0.5), Estimate(0.2, 0.1, 0.3), None)
    similarity = Estimate(0.9, 0.85, 0.95)
    overlap, missing = Estimate(0.25, 0.2, 0.3), ("x: array y",)
    found = Audit("<mine>", 10, 40, "all items", (change,), (), overlap, similarity, None, missing)
    html = render(page_of_audit(found, "llm-srec audit --arrays a.npz"))
    texts = ("Order audit of &lt;mine&gt;", "0.4000 ±0.1000", "0.900 ±0.050", "x: array y", "--arrays a.npz")
    assert not [text for text in texts if text not in html]
