"""Rankings of the whole catalog by inner product: the rank of each user's target, and the items at the top.

Products are summed in float64 and rounded to fp32, so that neither the number of users ranked at once, nor TF32, nor
autocast changes a rank, and equal vectors tie.

Letters: B users, b users of a block, D width of the vectors, N items of the catalog, P pairs of a user and an excluded
item, K length of a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.evaluation.ranking import Floats, Ints, Ranks, check_finite, concatenate, to_numpy

CHUNK = 1 << 25
"""Scores held at once, at 12 bytes each; at least those of one user."""


class CatalogRanking(NamedTuple):
    """Ranking of the catalog per user."""

    ranks: Ranks
    top_BK: Ints
    """Item ids of the highest scores, best first, equal scores by id; 0 where fewer items are ranked."""


@dataclass(frozen=True)
class Catalog:
    """Item vectors, prepared for many batches of users."""

    item_DN: Tensor
    """float64; column j - 1 is item j."""

    @staticmethod
    def of(item_ND: Tensor) -> Catalog:
        """Prepare vectors of items 1 to N, on their device, which must have float64 (1e6 items of 128: 1 GB).

        Raises:
            ValueError: a vector is not finite.
        """
        check_finite(item_ND, "item")
        return Catalog(item_ND.double().T)

    @property
    def num_items(self) -> int:
        """Items N."""
        return self.item_DN.shape[1]

    def rank(
        self,
        user_BD: Tensor,
        target_B: Tensor,
        exclude: Sequence[Sequence[int] | Ints],
        length: int = 0,
        chunk: int = CHUNK,
    ) -> CatalogRanking:
        """Rank each user's target among all items, leaving out the items in `exclude`, and list the top items.

        Args:
            target_B: item ids 1..N. The target is ranked even if it is in `exclude`, but then not listed.
            exclude: item ids to leave out, one collection per user, usually the history; repeated ids count once, and
                0 is padding.
            length: items to list; 0: none.
            chunk: see `CHUNK`.

        Raises:
            ValueError: a vector is not finite, or an id is outside the catalog.
        """
        if len(user_BD) and not 1 <= int(target_B.min()) <= int(target_B.max()) <= self.num_items:
            raise ValueError(
                f"target ids run from 1 to {self.num_items}; got {int(target_B.min())}..{int(target_B.max())}"
            )
        ranks, lists = [], [np.zeros((0, length), np.int64)]
        for block in self._blocks(user_BD, exclude, chunk):
            ranks.append(block.rank(target_B[block.users].long() - 1))
            lists.append(block.top(length))
        return CatalogRanking(concatenate(ranks), np.concatenate(lists))

    def top(self, user_BD: Tensor, exclude: Sequence[Sequence[int] | Ints], length: int, chunk: int = CHUNK) -> Ints:
        """(B, length) ids of the highest scoring items per user (see `CatalogRanking.top_BK`); raises as `rank`."""
        blocks = self._blocks(user_BD, exclude, chunk)
        return np.concatenate([np.zeros((0, length), np.int64), *(block.top(length) for block in blocks)])

    def best(
        self, user_BD: Tensor, exclude: Sequence[Sequence[int] | Ints], length: int, chunk: int = CHUNK
    ) -> tuple[Ints, Floats]:
        """`top`, and the (B, length) scores of these items; minus infinity where fewer items are ranked."""
        found = [block.best(length) for block in self._blocks(user_BD, exclude, chunk)]
        ids = np.concatenate([np.zeros((0, length), np.int64), *(top_bK for top_bK, _ in found)])
        return ids, np.concatenate([np.zeros((0, length)), *(score_bK for _, score_bK in found)])

    def _blocks(self, user_BD: Tensor, exclude: Sequence[Sequence[int] | Ints], chunk: int) -> Iterator[_Block]:
        check_finite(user_BD, "user")
        start_B, excluded = _flatten(exclude, len(user_BD), self.num_items)
        users_per_block = max(1, chunk // max(self.num_items, 1))
        for first in range(0, len(user_BD), users_per_block):
            last = min(first + users_per_block, len(user_BD))
            score_bN = (user_BD[first:last].double() @ self.item_DN).float()
            user_P = np.repeat(np.arange(last - first), np.diff(start_B[first : last + 1]))
            row_P = excluded[start_B[first] : start_B[last]] - 1
            excluded_2P = torch.from_numpy(np.stack([user_P, row_P])).to(score_bN.device)
            yield _Block(slice(first, last), score_bN, excluded_2P)


def rank_catalog(
    user_BD: Tensor,
    item_ND: Tensor,
    target_B: Tensor,
    exclude: Sequence[Sequence[int] | Ints],
    chunk: int = CHUNK,
) -> Ranks:
    """`Catalog.rank` for a single batch, without lists."""
    return Catalog.of(item_ND).rank(user_BD, target_B, exclude, chunk=chunk).ranks


@dataclass(frozen=True)
class _Block:
    """Scores of a few users; overwritten by its methods, of which `rank` comes before `top`."""

    users: slice
    score_bN: Tensor
    excluded_2P: Tensor
    """Users of the block, and a row that each of them leaves out."""

    def rank(self, row_b: Tensor) -> Ranks:
        """Rank the item in row `row_b` of each user."""
        row_b1 = row_b.unsqueeze(1)
        target_b1 = self.score_bN.gather(1, row_b1)
        # NaN compares false with everything, so an overwritten score is neither above the target nor tied with it.
        self._leave_out(float("nan"))
        listed_b1 = self.score_bN.gather(1, row_b1)
        self.score_bN.scatter_(1, row_b1, float("nan"))
        ranks = Ranks(
            greater=to_numpy((self.score_bN > target_b1).sum(dim=1)),
            ties=to_numpy((self.score_bN == target_b1).sum(dim=1)),
            candidates=to_numpy((~self.score_bN.isnan()).sum(dim=1) + 1),
        )
        self.score_bN.scatter_(1, row_b1, listed_b1)
        return ranks

    def top(self, length: int) -> Ints:
        """(b, length) item ids; see `CatalogRanking.top_BK`."""
        return self.best(length)[0]

    def best(self, length: int) -> tuple[Ints, Floats]:
        """(b, length) item ids and their scores; see `Catalog.best`."""
        listed = min(length, self.score_bN.shape[1])
        lowest = float("-inf")
        top_bK: Ints = np.zeros((len(self.score_bN), length), np.int64)
        score_bK: Floats = np.full((len(self.score_bN), length), lowest)
        if not listed:
            return top_bK, score_bK
        self._leave_out(lowest)
        value_bK, row_bK = self.score_bN.topk(listed, dim=1)
        # topk keeps any of several equal scores: sort where the last place is shared, otherwise only within the list.
        shared_b = (self.score_bN >= value_bK[:, -1:]).sum(dim=1) > listed
        row_bK = row_bK.sort(dim=1).values
        order_bK = self.score_bN.gather(1, row_bK).sort(dim=1, descending=True, stable=True).indices
        row_bK = row_bK.gather(1, order_bK)
        if bool(shared_b.any()):
            sorted_bN = self.score_bN[shared_b].sort(dim=1, descending=True, stable=True).indices
            row_bK[shared_b] = sorted_bN[:, :listed]
        value_bK = self.score_bN.gather(1, row_bK)
        top_bK[:, :listed] = to_numpy((row_bK + 1).masked_fill(value_bK == lowest, 0))
        score_bK[:, :listed] = value_bK.cpu().numpy()
        return top_bK, score_bK

    def _leave_out(self, score: float) -> None:
        """Overwrite the scores of the items that are left out."""
        self.score_bN[self.excluded_2P[0], self.excluded_2P[1]] = score


def _flatten(exclude: Sequence[Sequence[int] | Ints], num_users: int, num_items: int) -> tuple[Ints, Ints]:
    """(U + 1,) offsets of each user's ids, and the ids of all users joined end to end, without 0."""
    if len(exclude) != num_users:
        raise ValueError(f"`exclude` has entries for {len(exclude)} users, but there are {num_users}")
    per_user = [np.asarray(ids, dtype=np.int64) for ids in exclude]
    per_user = [ids[ids != 0] for ids in per_user]
    start_B = np.concatenate(([0], np.cumsum([len(ids) for ids in per_user], dtype=np.int64)))
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *per_user])
    if flat.size and not 1 <= flat.min() <= flat.max() <= num_items:
        raise ValueError(f"ids to exclude run from 1 to {num_items}; got {flat.min()}..{flat.max()}")
    return start_B, flat
