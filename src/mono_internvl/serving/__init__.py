"""Answering: a conversation that reads every token once."""
