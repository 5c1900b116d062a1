"""Builds sharded datasets from raw reviews, offline and without torch: `python -m shards --help`."""
