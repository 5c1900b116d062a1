"""Builds histories from events of any number: users are cut into parts by their seeded hashes, and a part at a time is
in memory. Only facts about items, and a length per user, are kept of all parts."""
