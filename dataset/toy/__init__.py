"""The verifiable toy world: one file per kind of question, its tools and its scorer."""
