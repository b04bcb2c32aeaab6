"""Data sets on disk to batches."""
