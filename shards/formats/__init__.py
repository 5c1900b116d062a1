"""Reads columns of files as frames: parquet, JSON lines, text tables; errors name file and line."""
