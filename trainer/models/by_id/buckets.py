"""Rows of similar lengths computed together, so that little padding is computed.

Letters: B rows of a batch, L its positions, S slots: the positions of all buckets end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SLOTS = 4096
"""Most slots of a bucket on a CPU, so that a block of its scores of attention stays in the cache."""
_PADDING = 128
"""Most padding of a bucket, in slots: about what one more bucket costs."""


@dataclass(frozen=True)
class Buckets:
    """A batch that is padded on the left, its rows ordered by length and cut into buckets.

    A bucket is padded on the *right* to its longest row: a causal model then needs no mask, for no position sees the
    padding behind it.
    """

    shapes: tuple[tuple[int, int], ...]
    """Rows and positions of each bucket."""
    row_S: Tensor
    """Row of the batch."""
    place_S: Tensor
    """Position within the row, 0 for its first item."""
    column_S: Tensor
    """Position within the batch's padded row; of padding, the last one."""
    slot_BL: Tensor
    """Slot of each position of the batch; undefined where the batch has padding."""
    row_B: Tensor
    """Rows of the batch in the order of the buckets."""
    last_B: Tensor
    """Last position within each of these rows; 0 for a row without items."""
    last_slot_B: Tensor
    """The slots of these positions."""


def bucketed(length_B: Tensor, width: int) -> Buckets:
    """Buckets of a batch of `width` positions whose rows have `length_B` items.

    An accelerator gets a single bucket of full width, for it is slower with many small operations and would have to
    wait for the lengths.
    """
    rows, device = len(length_B), length_B.device
    if device.type == "cpu" and rows:
        sorted_B, row_B = length_B.sort(descending=True, stable=True)
        shapes = tuple(_shapes(sorted_B.tolist()))
    else:
        row_B, shapes = torch.arange(rows, device=device), ((rows, width),)
    padded_B = torch.cat([torch.full((count,), length, device=device) for count, length in shapes])
    start_B = padded_B.cumsum(0) - padded_B
    # By bucket, so that an accelerator knows every shape beforehand.
    parts = torch.split(torch.arange(rows, device=device), [count for count, _ in shapes])
    order_S = torch.cat([part.repeat_interleave(length) for part, (_, length) in zip(parts, shapes, strict=True)])
    row_S, place_S = row_B[order_S], torch.arange(len(order_S), device=device) - start_B[order_S]
    column_S = place_S + (width - length_B)[row_S]
    first_B = torch.empty_like(start_B).index_copy(0, row_B, start_B) - (width - length_B)
    last_B = (length_B[row_B] - 1).clamp(min=0)
    return Buckets(
        shapes=shapes,
        row_S=row_S,
        place_S=place_S,
        column_S=column_S.clamp(max=width - 1),
        slot_BL=first_B[:, None] + torch.arange(width, device=device),
        row_B=row_B,
        last_B=last_B,
        last_slot_B=start_B + last_B,
    )


def _shapes(descending: list[int]) -> Iterator[tuple[int, int]]:
    """Rows and positions of each bucket, for rows of these lengths."""
    longest = rows = padding = 0
    for length in descending:
        padding += longest - length
        if rows and (padding > _PADDING or (rows + 1) * longest > _SLOTS):
            yield rows, longest
            rows = 0
        if not rows:
            longest, padding = max(length, 1), 0
        rows += 1
    if rows:
        yield rows, longest
