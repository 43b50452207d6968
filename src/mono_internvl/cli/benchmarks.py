"""The benchmarks that `mono-internvl evaluate` knows by name."""

from mono_internvl.evaluation.benchmarks import BENCHMARKS as GENERIC
from mono_internvl.miniature.scoring import BENCHMARK as MINIATURE

BENCHMARKS = {**GENERIC, MINIATURE.name: MINIATURE}
"""Benchmarks by name; the first is taken unless another is asked for."""
