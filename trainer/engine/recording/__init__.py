"""A run's progress and metrics: terminal, log, `metrics.jsonl`, TensorBoard and other trackers. Rank 0 only."""
