"""Literal types shared by configuration, evaluation and results."""

from __future__ import annotations

from typing import Literal

Task = Literal["retrieval", "generation"]
"""Next-item retrieval, or next-item-title generation."""
Split = Literal["valid", "test"]
"""Which held-out item is the target."""
Candidates = Literal["sampled", "full", "full_with_seen"]
"""Ranked against the negatives stored with the dataset, against every item that the user has not seen, or against all
items. The field uses both kinds of full ranking."""
HistoryOrder = Literal["original", "shuffled"]
"""Histories in their original order, or with their items shuffled (KDD'25, §2.3)."""
Tie = Literal["expectation", "optimistic", "pessimistic"]
"""How a target ranks among items of equal score: averaged over all orders, before them, or behind them."""
RepeatDates = Literal["own", "last"]
"""Dates of an item that occurs more than once in a history; see `DataConfig.repeat_dates`."""
UnseenItems = Literal["mean", "zero", "random"]
"""What stands for the vector of an item that was not trained; see `trainer.models.transfer`."""
TrainingOrder = Literal["original", "window", "history", "sequence"]
"""Order of the items that a system is trained on; see `DataConfig.training_order`."""

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
