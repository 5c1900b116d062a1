"""Exports: a trained run as one folder that stands alone, its model card, its index, and its way to the hub."""
