"""Files from elsewhere: downloads over https, and datasets whose shards are at an address instead of in the folder."""
