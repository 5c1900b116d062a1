"""The choices that configuration, evaluation and results share, each defined once."""

from __future__ import annotations

from typing import Literal

Task = Literal["retrieval", "generation"]
"""Next-item retrieval, or next-item-title generation."""
Split = Literal["valid", "test"]
"""Which held-out item is predicted."""
Candidates = Literal["sampled", "full"]
"""The stored negatives of the dataset, or every item that the user has not seen."""
HistoryOrder = Literal["original", "shuffled"]
"""Histories as they happened, or with their items shuffled (KDD'25, §2.3)."""
Tie = Literal["expectation", "optimistic", "pessimistic"]
"""Where a target stands among items of equal score."""
