"""Dataset statistics, and the paper's Table 10 to compare them with."""

import dataclasses
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.manifest import Manifest, Stage, Statistics
from shards.partitions.engine import Parts
from shards.sequences import Sequences
from shards.stored.order import OrderFacts


@dataclass(frozen=True)
class PaperRow:
    """A dataset in Table 10 of the paper."""

    name: str
    users: int
    items: int
    interactions: int

    @property
    def mean_length(self) -> float:
        """Interactions per user."""
        return self.interactions / self.users


TABLE_10 = (
    PaperRow("Movies", 11_947, 17_490, 144_071),
    PaperRow("Scientific", 23_627, 25_764, 266_164),
    PaperRow("Electronics", 27_601, 31_533, 292_308),
    PaperRow("CDs", 18_481, 30_951, 284_695),
)
_AMAZON_NAMES = {
    "movies_and_tv": "Movies",
    "industrial_and_scientific": "Scientific",
    "electronics": "Electronics",
    "cds_and_vinyl": "CDs",
}


def paper_row(name: str) -> PaperRow | None:
    """Find the row of Table 10 by the paper's name (`CDs`) or Amazon's (`CDs_and_Vinyl`), case-insensitively."""
    wanted = _AMAZON_NAMES.get(name.lower(), name).lower()
    return next((row for row in TABLE_10 if row.name.lower() == wanted), None)


def measure(
    parts: Parts[Sequences],
    stages: tuple[Stage, ...],
    *,
    items: int,
    duplicate_events: int,
    bad_times: int,
    missing_titles: int,
) -> Statistics:
    """Compute the statistics that the manifest stores.

    Args:
        parts: all users of the dataset.
    """
    counts = list(parts.each(_counts))
    lengths = np.concatenate([part.lengths for part in counts])
    return Statistics(
        users=len(lengths),
        items=items,
        interactions=int(lengths.sum()),
        mean_length=round(float(lengths.mean()), 4),
        median_length=float(np.median(lengths)),
        min_length=int(lengths.min()),
        max_length=int(lengths.max()),
        users_with_valid=sum(part.with_valid for part in counts),
        users_with_test=sum(part.with_test for part in counts),
        duplicate_events=duplicate_events,
        bad_times=bad_times,
        tied_pairs=sum(part.tied_pairs for part in counts),
        missing_titles=missing_titles,
        stages=stages,
    )


class _Counts(NamedTuple):
    """Counts of some of the users."""

    lengths: npt.NDArray[np.int64]
    with_valid: int
    with_test: int
    tied_pairs: int


def _counts(part: Sequences) -> _Counts:
    return _Counts(part.lengths, int((part.valid_items > 0).sum()), int((part.test_items > 0).sum()), part.tied_pairs)


def stats_json(manifest: Manifest, order: OrderFacts | None = None) -> str:
    """Format name, fingerprint, statistics, the paper's row and, if given, the facts about order as one JSON object."""
    row = paper_row(manifest.name)
    content = {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        **dataclasses.asdict(manifest.statistics),
        "paper": None if row is None else {**dataclasses.asdict(row), "mean_length": round(row.mean_length, 4)},
    }
    if order is not None:
        content["order"] = dataclasses.asdict(order)
    return json.dumps(content, indent=1, sort_keys=True)


def stats_text(manifest: Manifest, order: OrderFacts | None = None) -> str:
    """Format the statistics as a text table, beside those of the paper if it has the dataset; then the facts about
    order, if given."""
    found = manifest.statistics
    row = paper_row(manifest.name)
    paper = (
        {} if row is None else {name: getattr(row, name) for name in ("users", "items", "interactions", "mean_length")}
    )
    values: dict[str, int | float] = {
        "users": found.users,
        "items": found.items,
        "interactions": found.interactions,
        "mean_length": found.mean_length,
        "median_length": found.median_length,
        "min_length": found.min_length,
        "max_length": found.max_length,
        "users_with_valid": found.users_with_valid,
        "users_with_test": found.users_with_test,
        "duplicate_events": found.duplicate_events,
        "bad_times": found.bad_times,
        "tied_pairs": found.tied_pairs,
        "missing_titles": found.missing_titles,
    }
    lines = [f"{'':18}{manifest.name:>28}" + (f"{'Table 10, ' + row.name:>24}" if row else "")]
    for name, value in values.items():
        lines.append(
            f"{name.replace('_', ' '):18}{_number(value):>28}"
            + (f"{_number(paper[name]):>24}" if name in paper else "")
        )
    if manifest.num_targets("test") > found.users_with_test:
        lines.append(f"{'test targets':18}{_number(manifest.num_targets('test')):>28}")
    if left_out := manifest.num_users - manifest.num_train_users:
        lines.append(f"{'not trained on':18}{_number(left_out):>28}")
    lines += ["", f"{'after':18}{'users':>12}{'items':>12}{'interactions':>16}"]
    lines += [f"{s.name:18}{s.users:>12,}{s.items:>12,}{s.interactions:>16,}" for s in found.stages]
    return "\n".join(lines + ([] if order is None else _order_lines(order)))


def _order_lines(order: OrderFacts) -> list[str]:
    pairs = {
        "2-gram rules": (order.rules_2, "{:,.0f}"),
        "3-gram rules": (order.rules_3, "{:,.0f}"),
        "chain HR@10": (order.chain_hit_rate, "{:.4f}"),
    }
    lines = ["", f"{'order':18}{'original':>12}{'shuffled':>12}{'after / before':>16}"]
    for name, (pair, form) in pairs.items():
        ratio = "-" if pair.ratio is None else f"{pair.ratio:.2f}"
        lines.append(f"{name:18}{form.format(pair.original):>12}{form.format(pair.shuffled):>12}{ratio:>16}")
    lines += [
        f"{'popular HR@10':18}{order.popular_hit_rate:>12.4f}",
        f"{'chain Jaccard@10':18}{'':12}{order.chain_jaccard:>12.2f}",
        "rules: n-grams that occur more than 5 times, in at least 10 % of the cases. chain: the most frequent",
        "successors of the last item. after / before near 0: shuffling destroys what order tells; near 1: a system",
        "that ignores order may do as well.",
    ]
    if order.later_training:
        lines.append(
            f"{100 * order.later_training:.0f} % of the training events are later than the median test event: "
            "--split temporal does not leak."
        )
    return lines


def _number(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
