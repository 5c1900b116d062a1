"""Raw ids at the boundary: what people and companies call users and items, and the numbers the trainer uses inside."""
