"""Questions that tell whether a language model knows the catalog of a dataset before it is trained on anything.

The model reads lines of the catalog, then the raw id of one more item, and writes. Ids say nothing about titles, so a
model that answers more often with the item's own title than with that of another item has seen such lines, and its
results on the dataset may profit (Di Palma et al., *Do LLMs Memorize Recommendation Datasets?*, arXiv:2505.10212, who
find four of five items of MovieLens-1M in GPT-4o). The second half of a title after its first half shows whether it
knows the item from anywhere.

Letters: I items that are asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.raw.items import RawItems, normalized
from trainer.data.reading.counter_rng import permutation
from trainer.evaluation.ranking import Estimate, Floats, bootstrap

Generate = Callable[[Sequence[str], Sequence[str]], list[str]]
"""Continues each prompt greedily up to the end of the line, or somewhat further than the expected answer is long."""

BY_ID, BY_OTHER_ID, SECOND_HALF = "title by its own raw id", "title by another raw id", "second half of the title"
BEYOND_CONTROL = "own id minus another id"
_SAMPLE = 0x3E30
"""Address of the sample's random numbers."""


@dataclass(frozen=True)
class Memorized:
    """Answers of a model that are right."""

    right_I: Mapping[str, Floats]
    """Whether the answer is exact, 0 or 1, by question; titles of one word have no second half. `BY_OTHER_ID`, the
    control, is the share of all other ids that were answered with this title."""

    def shares(self, seed: int = 0) -> dict[str, Estimate]:
        """Share of exact answers by question, and the difference to the control, with 95 % bootstrap intervals."""
        right = {**self.right_I, BEYOND_CONTROL: self.right_I[BY_ID] - self.right_I[BY_OTHER_ID]}
        return {name: bootstrap(value_I, seed) for name, value_I in right.items() if len(value_I)}

    def knows_ids(self, seed: int = 0) -> bool:
        """Whether items are answered with their own titles more often than others are, by an interval above 0."""
        return self.shares(seed)[BEYOND_CONTROL].low > 0


def probe(items: RawItems, generate: Generate, number: int, *, shots: int = 5, seed: int = 0) -> Memorized:
    """Ask about a fixed random sample of items.

    Args:
        number: items to ask about; all but the shots, if there are fewer.
        shots: other items whose lines precede the question.

    Raises:
        ValueError: the catalog has fewer than two items beside the shots.
    """
    order = [int(item) for item in permutation(len(items), seed, _SAMPLE)]
    shown, asked = order[:shots], order[shots : shots + number]
    if len(asked) < 2:
        raise ValueError(f"{items.source} has {len(items)} items, too few to show {shots} and to ask about others")
    titles = [items.titles[item] for item in asked]
    known = "".join(f"{items.ids[item]}::{items.titles[item]}\n" for item in shown)
    # A model that knows the file may go on with its further columns.
    answers = [
        normalized(answer.split("::")[0])
        for answer in generate([f"{known}{items.ids[item]}::" for item in asked], titles)
    ]
    own_I = np.array([answer == normalized(title) for answer, title in zip(answers, titles, strict=True)], np.float64)
    all_I = np.array([answers.count(normalized(title)) for title in titles], np.float64)
    halves = [_halves(title) for title in titles if " " in title]
    seen = "".join(f"{items.titles[item]}\n" for item in shown)
    rests = [rest for _, rest in halves]
    second = generate([seen + first for first, _ in halves], rests)
    second_I = [normalized(said) == normalized(rest) for said, rest in zip(second, rests, strict=True)]
    return Memorized(
        {
            BY_ID: own_I,
            BY_OTHER_ID: (all_I - own_I) / (len(asked) - 1),
            SECOND_HALF: np.array(second_I, np.float64),
        }
    )


def _halves(title: str) -> tuple[str, str]:
    """A title cut before the word in its middle; the second half begins with the space."""
    words = title.split(" ")
    middle = len(words) // 2
    return " ".join(words[:middle]), "".join(f" {word}" for word in words[middle:])
