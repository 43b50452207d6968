"""Measured speed: compared subjects interleaved in one run, one row per measurement."""
