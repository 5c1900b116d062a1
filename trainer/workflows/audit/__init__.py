"""Order audits of trained runs, and of arrays of any model."""
