"""What a dataset folder is made of: tars of sequences, the catalog, users, candidates, and the folder itself."""
