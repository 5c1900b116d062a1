"""Several runs side by side: comparisons and sweeps, planned, run and tabulated."""
