"""Text on disk to token batches."""
