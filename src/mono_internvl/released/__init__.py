"""The layout of released checkpoints on disk: key table, weight files, loading and saving whole."""
