"""Checkpoint folders larger than memory: their weights are read, selected and written block by block."""
