"""Files: rows of JSON Lines, atomic writes, hashes, worker processes."""
