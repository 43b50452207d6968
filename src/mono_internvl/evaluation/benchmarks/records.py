"""Anybody's own records: JSON lines, each with a `kind` and the metric that scores it.

`kind` names the mean that a record counts in. A `metric` beside it says how its answer is scored;
without one, the kind is the name of the metric.
"""

from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.metrics.metric import METRICS
from mono_internvl.evaluation.protocol import Protocol

RECORDS = Benchmark(name="records", metrics=METRICS, protocols={"default": Protocol()})
