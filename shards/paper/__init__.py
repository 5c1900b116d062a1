"""The four datasets of the paper by name: where their files come from, and what its code does with them."""
