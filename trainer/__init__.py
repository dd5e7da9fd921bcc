"""One script per training stage, and the modules they share."""
