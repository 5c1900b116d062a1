"""Recommendations over HTTP: histories in, recommended items out, in batches of whoever asks at the same time."""
