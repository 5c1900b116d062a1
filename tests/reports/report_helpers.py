"""A result with chosen values, for tests of reports."""

from __future__ import annotations

from typing import Any

from trainer.evaluation.ranking import Estimate
from trainer.reports.results import Result


def result(ndcg_at_10: float, system: str = "LLM-SRec", **values: Any) -> Result:
    # HR@10 is always twice NDCG@10; the interval is 0.004 below and 0.002 above: half of it is 0.003.
    metrics = {
        name: Estimate(value, value - 0.004, value + 0.002)
        for name, value in {"NDCG@10": ndcg_at_10, "HR@10": 2 * ndcg_at_10}.items()
    }
    fields: dict[str, Any] = {
        "run": system,
        "system": system,
        "dataset": "Scientific",
        "dataset_fingerprint": "9f2c",
        "config_hash": "a1b2",
        "commit": "0123abc",
        "split": "test",
        "task": "retrieval",
        "candidates": "sampled",
        "num_candidates": 100,
        "history": "original",
        "tie": "expectation",
        "step": 1,
        "users": 27_601,
        "metrics": metrics,
        "seconds": 1.0,
        "tokens": 1,
        "peak_memory_bytes": 1,
        "device": "cpu",
        "created": "2025-03-08T12:00:00+00:00",
    }
    return Result(**{**fields, **values})
