"""What labels say besides token ids."""

IGNORED_LABEL = -100
"""Label of a token that no loss reads; PyTorch's default `ignore_index`."""
