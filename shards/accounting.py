"""Dropped rows and changed titles of a build, in words: nothing is lost in silence."""

import itertools
from collections.abc import Mapping

from shards.manifest import Manifest, Stage

_FILTERS = {
    "titled": ("of items without a title", "--missing-title official keeps them"),
    "k-core": ("by the k-core filter", "lower --min-user or --min-item to keep them"),
    "min-train": ("of users with too few training items", "lower --min-train to keep them"),
}
"""Reason for which a stage of the build drops rows, and the option that keeps them."""

_CHANGES = {
    "ids_from_floats": "ids that were floats, now integers",
    "ids_beyond_floats": "ids that were floats above 2^53, of which different ones may have been merged",
    "times_from_the_next_event": "events of histories without a time, now at the user's next one",
    "titles_unescaped": "titles with HTML entities, now replaced",
    "titles_without_tags": "titles with HTML tags, now removed",
    "titles_scripts": "titles that are scripts of a web page, now missing",
    "titles_nan_or_none": "titles that are NaN, None or null, now missing",
    "titles_not_text": "titles that are lists or objects, now missing",
}


def loss_warnings(stages: tuple[Stage, ...]) -> list[str]:
    """One line for each filter that drops more than a third of the users it gets."""
    lines = []
    for before, after in itertools.pairwise(stages):
        lost = before.users - after.users
        if after.name in _FILTERS and 3 * lost > before.users:
            what, cure = _FILTERS[after.name]
            share = f"{lost:,} of {before.users:,} users ({lost / before.users:.0%})"
            lines.append(f"warning: {share} are lost with the events {what}: {cure}")
    return lines


def summary(manifest: Manifest) -> list[str]:
    """The rows that were dropped, by reason, and the values that were changed; one line of each kind."""
    found, cleaning = manifest.statistics, manifest.cleaning
    reasons = {"without a user or item id": cleaning.get("events_without_id", 0)}
    reasons |= {"repeated": found.duplicate_events, "with bad times": found.bad_times}
    for before, after in itertools.pairwise(found.stages):
        if after.name in _FILTERS:
            reasons[_FILTERS[after.name][0]] = before.interactions - after.interactions
    lost = [f"{number:,} {reason}" for reason, number in reasons.items() if number]
    rows = found.stages[0].interactions + reasons["without a user or item id"]
    lines = [f"events: {rows:,} read, {found.interactions:,} kept; dropped: {', '.join(lost) or 'none'}"]
    return lines + changes(cleaning)


def changes(cleaning: Mapping[str, int]) -> list[str]:
    """The values that were changed while reading, one line for each kind."""
    return [f"{words}: {cleaning[key]:,}" for key, words in _CHANGES.items() if cleaning.get(key)]
