"""Benchmarks, one file each; `BENCHMARKS` names them."""

from mono_internvl.evaluation.benchmarks.records import RECORDS

BENCHMARKS = {benchmark.name: benchmark for benchmark in (RECORDS,)}
"""Benchmarks by name."""
