"""A row that nobody measured, for tests of what is done with rows."""

from mono_internvl.bench.rows import BenchRow

ROW = BenchRow(
    what="experts",
    subject="",
    shapes={},
    layers=1,
    dtype="bfloat16",
    device="made up",
    p20=1.0,
    p50=1.0,
    p80=1.0,
    n=1,
    clock="wall",
    command="none",
    commit="none",
    versions={},
    date="2026-01-31",
)
