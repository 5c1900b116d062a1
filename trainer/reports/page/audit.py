"""The page of an order audit."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.order.audit import Audit, Change
from trainer.reports.audit_text import reading
from trainer.reports.page.content import (
    MISSING,
    Block,
    Cell,
    Commands,
    Figure,
    Page,
    Section,
    Table,
    Text,
    signed,
)
from trainer.reports.page.figures import Span, interval_chart

_NOTE = "±, intervals: 95 % bootstrap over users; changes are paired."


def page_of_audit(audit: Audit, command: str) -> Page:
    """The page of an audit.

    Args:
        command: the command that repeats it.
    """
    sections = [_section("Histories shuffled at inference", audit.inference, "original", "shuffled")]
    if audit.training:
        names = "trained on original", "trained on shuffled"
        sections.append(_section("Histories shuffled in training", audit.training, *names))
    facts = {
        "overlap of lists (Jaccard@10), original and shuffled": audit.jaccard,
        "cosine of a user's vectors, original and shuffled": audit.similarity,
        "cosine of two different users' vectors": audit.similarity_of_others,
    }
    measured = [
        (name, Cell(f"{x.value:.3f} ±{x.half_width:.3f}", x.value)) for name, x in facts.items() if x is not None
    ]
    blocks: list[Block] = [Table.of(("", "value"), measured)]
    if audit.missing:
        blocks.append(Text("Not measured: " + "; ".join(audit.missing) + ".", small=True))
    sections += [Section("Lists and vectors", tuple(blocks)), Section("Reproduce", (Commands(command),))]
    return Page(
        title=f"Order audit of {audit.name}",
        subtitle=f"{audit.users:,} users · {audit.items:,} items · targets ranked among {audit.ranked}",
        sections=tuple(sections),
        verdict=reading(audit),
    )


def _section(title: str, changes: Sequence[Change], before: str, after: str) -> Section:
    rows = [
        (change.group, change.users, change.metric, change.before, change.after, *_relative(change))
        for change in changes
    ]
    columns = ("users", "number", "metric", before, after, "change", "interval of the change")
    panels = [
        interval_chart(
            metric,
            [
                Span(change.group, style, change.before, change.after)
                for style, change in enumerate(change for change in changes if change.metric == metric)
            ],
        )
        for metric in dict.fromkeys(change.metric for change in changes)
    ]
    figure = Figure(tuple(panels), caption=f"Filled: {before}. Hollow: {after}. Lines: 95 % intervals.")
    return Section(title, (figure, Table.of(columns, rows, note=_NOTE)))


def _relative(change: Change) -> tuple[Cell, Cell]:
    found = change.relative
    if found is None:
        return Cell(MISSING), Cell(MISSING)
    percent = Cell(f"{signed(100 * found.value, '.1f')} %", found.value)
    return percent, Cell(f"[{signed(100 * found.low, '.1f')}, {signed(100 * found.high, '.1f')}]")
