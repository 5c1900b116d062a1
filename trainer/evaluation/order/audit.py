"""Order audit: how much of what a model predicts depends on the order of the history.

Works on arrays of any model: its user vectors for original and for shuffled histories with its item vectors, or the
lists that it recommends. Measures the change of accuracy, the overlap of lists and the similarity of user vectors, for
all users and for those whose order, or whose target, should matter more. Relative changes are paired: both orders are
resampled with the same users.

Letters: U users, D width of the vectors, N items, K length of a list, E events of all histories, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, assert_never

import numpy as np
import numpy.typing as npt
import torch

from trainer.evaluation.beyond import LIST_LENGTH, jaccard
from trainer.evaluation.catalog import Catalog
from trainer.evaluation.order.groups import Mask, upper_half, warm_and_cold
from trainer.evaluation.order.similarity import cosines
from trainer.evaluation.ranking import Estimate, Floats, Ints, Ranks, bootstrap, bootstrap_all, metrics_per_target
from trainer.evaluation.significance import relative_change

Vectors = npt.NDArray[np.float32]

METRICS = ("NDCG@10", "HR@10")


@dataclass(frozen=True)
class VectorAnswers:
    """A model that scores by inner product, for one order of the histories."""

    user_UD: Vectors
    item_ND: Vectors
    """Row j - 1 is item j."""


@dataclass(frozen=True)
class ListAnswers:
    """The lists that a model recommends for one order of the histories."""

    top_UK: Ints
    """Item ids, best first, each once per list; 0 is padding."""


Answers = VectorAnswers | ListAnswers


@dataclass(frozen=True)
class AuditInput:
    """A model's answers for the same users in the same rows."""

    name: str
    num_items: int
    target_U: Ints
    """Item ids 1..N that the users chose next."""
    original: Answers
    shuffled: Answers
    trained_shuffled: Answers | None = None
    """For original histories, of the same model trained on shuffled ones."""
    seen: Sequence[Ints] | None = None
    """Items per user that are not ranked, usually the history; None: all items are ranked."""
    transition_score_U: Floats | None = None
    """`trainer.evaluation.order.groups.transition_scores`."""
    event_N: Ints | None = None
    """Training events of items 1..N."""


@dataclass(frozen=True)
class Change:
    """A metric before and after a change of the model's input, for a group of users."""

    metric: str
    group: str
    users: int
    before: Estimate
    after: Estimate
    relative: Estimate | None
    """after / before - 1, with a paired interval; None if before is 0."""


@dataclass(frozen=True)
class Audit:
    """Result of an audit; plain numbers, which `dataclasses.asdict` turns into JSON."""

    FORMAT: ClassVar = 1

    name: str
    users: int
    items: int
    ranked: str
    """What the targets were ranked among."""
    inference: tuple[Change, ...]
    """Original against shuffled histories, at inference."""
    training: tuple[Change, ...]
    """Trained on original against trained on shuffled histories, both asked about original ones; empty if not given."""
    jaccard: Estimate
    """Mean Jaccard@10 of the lists for original and shuffled histories."""
    similarity: Estimate | None
    """Mean cosine of a user's vectors for original and shuffled histories; None for lists."""
    similarity_of_others: Estimate | None
    """Mean cosine of the vectors of two different users, for original histories: what `similarity` is compared with."""
    missing: tuple[str, ...]
    """What could not be measured, and the array that it needs."""


def audit(given: AuditInput, seed: int = 0) -> Audit:
    """Measure how much a model's answers depend on order.

    Args:
        seed: of the bootstrap.

    Raises:
        ValueError: vectors that are not finite, or ids outside the catalog.
    """
    before, after = _answers(given, given.original), _answers(given, given.shuffled)
    groups = _groups(given)
    training: tuple[Change, ...] = ()
    if given.trained_shuffled is not None:
        training = _changes(before, _answers(given, given.trained_shuffled), groups, seed)
    similarity, of_others = _similarities(given, seed)
    seen_too = given.seen is None
    return Audit(
        name=given.name,
        users=len(given.target_U),
        items=given.num_items,
        ranked="the model's lists"
        if before.from_lists
        else f"all items{'' if seen_too else ' that the user has not seen'}",
        inference=_changes(before, after, groups, seed),
        training=training,
        jaccard=bootstrap(jaccard(before.top_UK, after.top_UK), seed),
        similarity=similarity,
        similarity_of_others=of_others,
        missing=tuple(_missing(given)),
    )


@dataclass(frozen=True)
class _Measured:
    metrics: dict[str, Floats]
    top_UK: Ints
    from_lists: bool


def _answers(given: AuditInput, answers: Answers) -> _Measured:
    """Metrics and lists of ten per user."""
    match answers:
        case VectorAnswers() as vectors:
            exclude = given.seen if given.seen is not None else [np.zeros(0, np.int64)] * len(given.target_U)
            catalog, user_UD = Catalog.of(torch.from_numpy(vectors.item_ND)), torch.from_numpy(vectors.user_UD)
            ranks, top_UK = catalog.rank(user_UD, torch.from_numpy(given.target_U), exclude, LIST_LENGTH)
            return _Measured(metrics_per_target(ranks), top_UK, False)
        case ListAnswers() as lists:
            top_UK = lists.top_UK[:, :LIST_LENGTH]
            hit_UK = top_UK == given.target_U[:, None]
            # A target that is not listed ranks behind every cut-off.
            place_U = np.where(hit_UK.any(1), hit_UK.argmax(1), LIST_LENGTH)
            ranks = Ranks(place_U, np.zeros_like(place_U), np.full_like(place_U, max(given.num_items, LIST_LENGTH + 1)))
            return _Measured(metrics_per_target(ranks), top_UK, True)
        case unknown:
            assert_never(unknown)


def _groups(given: AuditInput) -> dict[str, Mask]:
    """Rows of the users of each group; groups without users are left out."""
    groups = {"all users": np.ones(len(given.target_U), bool)}
    if given.transition_score_U is not None:
        frequent_U = upper_half(given.transition_score_U)
        groups |= {"frequent transitions": frequent_U, "rare transitions": ~frequent_U}
    if given.event_N is not None:
        warm_N, cold_N = warm_and_cold(given.event_N)
        groups |= {"warm targets": warm_N[given.target_U - 1], "cold targets": cold_N[given.target_U - 1]}
    return {name: chosen_U for name, chosen_U in groups.items() if chosen_U.any()}


def _changes(before: _Measured, after: _Measured, groups: dict[str, Mask], seed: int) -> tuple[Change, ...]:
    return tuple(
        _change(metric, group, before.metrics[metric][chosen_U], after.metrics[metric][chosen_U], seed)
        for group, chosen_U in groups.items()
        for metric in METRICS
    )


def _change(metric: str, group: str, before_U: Floats, after_U: Floats, seed: int) -> Change:
    relative = relative_change(before_U, after_U, seed) if before_U.any() else None
    both = bootstrap_all({"before": before_U, "after": after_U}, seed)
    return Change(metric, group, len(before_U), both["before"], both["after"], relative)


def _similarities(given: AuditInput, seed: int) -> tuple[Estimate | None, Estimate | None]:
    if not isinstance(given.original, VectorAnswers) or not isinstance(given.shuffled, VectorAnswers):
        return None, None
    own = cosines(given.original.user_UD, given.shuffled.user_UD)
    others = None
    if len(own) > 1:
        # The next user in a random circle is never the user itself.
        circle = np.random.default_rng(seed).permutation(len(own))
        one_UD = given.original.user_UD[circle]
        others = bootstrap(cosines(one_UD, np.roll(one_UD, 1, axis=0)), seed)
    return bootstrap(own, seed), others


def _missing(given: AuditInput) -> list[str]:
    notes = []
    if given.trained_shuffled is None:
        notes.append("the change by training on shuffled histories: needs the answers of a model trained so")
    if given.transition_score_U is None:
        notes.append("users with frequent and rare transitions: need histories")
    if given.event_N is None:
        notes.append("warm and cold targets: need training counts")
    if not isinstance(given.original, VectorAnswers):
        notes.append("similarity of representations: needs vectors instead of lists")
    elif given.seen is None:
        notes.append("a ranking of unseen items alone: needs histories; seen items were ranked too")
    return notes
