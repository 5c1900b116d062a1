"""An order audit as one page of text or Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from trainer.evaluation.order.audit import Audit, Change
from trainer.evaluation.ranking import Estimate
from trainer.reports.tables import Style


def audit_json(audit: Audit) -> str:
    """All numbers of an audit."""
    return json.dumps({"format": Audit.FORMAT, **asdict(audit)}, indent=1, allow_nan=False)


def audit_page(audit: Audit, style: Style = "text") -> str:
    """The audit as a page: what was measured, the tables, and what each number means."""
    heading = "# " if style == "markdown" else ""
    render = _markdown if style == "markdown" else _text
    blocks = [
        f"{heading}Order audit of {audit.name}",
        f"{audit.users:,} users, {audit.items:,} items; targets ranked among {audit.ranked}.",
        "±, intervals: 95 % bootstrap over users; changes are paired.",
    ]
    rows = _rows(audit.inference, "original", "shuffled")
    blocks.append(f"{_bold('Histories shuffled at inference', style)}\n\n{render(rows)}")
    if audit.training:
        rows = _rows(audit.training, "trained on original", "trained on shuffled")
        blocks.append(f"{_bold('Histories shuffled in training', style)}\n\n{render(rows)}")
    facts = [("overlap of lists (Jaccard@10), original and shuffled", _interval(audit.jaccard, "{:.3f}"))]
    if audit.similarity is not None:
        facts.append(("cosine of a user's vectors, original and shuffled", _interval(audit.similarity, "{:.3f}")))
    if audit.similarity_of_others is not None:
        facts.append(("cosine of two different users' vectors", _interval(audit.similarity_of_others, "{:.3f}")))
    blocks.append(f"{_bold('What order changes', style)}\n\n{render([('', 'value and interval'), *facts])}")
    blocks.append(reading(audit))
    if audit.missing:
        blocks.append("\n".join(["Not measured:", *(f"- {what}" for what in audit.missing)]))
    return "\n\n".join(blocks) + "\n"


def reading(audit: Audit) -> str:
    """One sentence on whether the model uses order, from the interval of the first metric over all users."""
    change = audit.inference[0]
    if change.relative is None:
        return f"{change.metric} is 0 on original histories: this model cannot be judged."
    if change.relative.high < 0:
        fall = -100 * change.relative.value
        verdict = f"{change.metric} falls by {fall:.1f} % when histories are shuffled: the model uses order"
    elif change.relative.low > 0:
        verdict = f"{change.metric} rises when histories are shuffled: order misleads the model"
    else:
        verdict = f"{change.metric} does not change distinguishably when histories are shuffled"
    return f"{verdict} (interval {100 * change.relative.low:+.1f} to {100 * change.relative.high:+.1f} %)."


def _rows(changes: Sequence[Change], before: str, after: str) -> list[tuple[str, ...]]:
    return [
        ("users", "number", "metric", before, after, "change", "interval of the change"),
        *(
            (
                change.group,
                f"{change.users:,}",
                change.metric,
                _interval(change.before, "{:.4f}"),
                _interval(change.after, "{:.4f}"),
                "-" if change.relative is None else f"{100 * change.relative.value:+.1f} %",
                "-" if change.relative is None else _percent(change.relative),
            )
            for change in changes
        ),
    ]


def _interval(estimate: Estimate, form: str) -> str:
    return f"{form.format(estimate.value)} ±{form.format(estimate.half_width)}"


def _percent(estimate: Estimate) -> str:
    return f"[{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _bold(title: str, style: Style) -> str:
    return f"**{title}**" if style == "markdown" else title


def _text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
