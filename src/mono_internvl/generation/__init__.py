"""Prompts to tokens: many requests at once, with one batch of keys and values."""
