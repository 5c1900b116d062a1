"""Raw reviews to sharded datasets, offline and without torch: `python -m shards --help`."""
