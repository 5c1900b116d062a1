"""Reads datasets that were built: records of shards, users, and facts about their order."""
