"""Parameters, FLOPs, bytes and memory of a model, computed without running it."""
