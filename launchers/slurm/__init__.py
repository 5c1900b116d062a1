"""Runs as Slurm jobs; docs/clusters.md says how."""
