"""Recommendations of a trained run: for users of its dataset, and for histories that anyone gives."""
