"""How much a model depends on the order of histories: user groups, similarity of vectors, the audit."""
