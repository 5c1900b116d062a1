"""Contents of a dataset folder: tars of sequences, the catalog, users, candidates, and the folder itself."""
