"""`bench profile`: where the time of a prefill goes, ours beside the plain language model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

from torch.profiler import ProfilerActivity, profile

from mono_internvl.bench.models import Setting
from mono_internvl.bench.prefill import BEST, BLOCKED_ONLY, LLAMA, PLAIN, prefill_subjects
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, fields_of, percentile
from mono_internvl.errors import ConfigError

PROFILED = (LLAMA, PLAIN, BLOCKED_ONLY, BEST)
ALL = "all"
KINDS = {
    "products of weights": ("mm", "addmm", "_grouped_mm", "mkldnn_linear"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "bmm",
        "baddbmm",
        "_softmax",
        "masked_fill_",
    ),
    "convolution": ("mkldnn_convolution", "_slow_conv2d_forward"),
    "gathering and joining rows": (
        "index_select",
        "index",
        "index_copy_",
        "index_put_",
        "_index_put_impl_",
        "masked_scatter_",
        "cat",
        "embedding",
    ),
    "copies and casts": ("copy_", "fill_", "zero_"),
}
"""Kind of work -> operators of `aten` whose own time it is; the rest is `OTHER`."""
OTHER = "elementwise: norms, rotation, SwiGLU, sums"
_KIND_OF = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}


def bench_profile(setting: Setting) -> Iterator[BenchRow]:
    """Seconds of each kind of work, a table for each subject, one thread's own time per operator.

    Profiling slows what it watches, most of all many small operators: shares say more than seconds.

    Raises:
        ConfigError: On an accelerator, whose kernels no operator owns.
    """
    if setting.device.type != "cpu":
        raise ConfigError(
            f"device={str(setting.device)!r}; `bench profile` watches a CPU: device='cpu'"
        )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop
    subjects = [one for one in prefill_subjects(setting, False) if one.name in PROFILED]
    seconds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(setting.rounds + 1):  # the first is not counted
        for subject in subjects:
            found = _profiled(subject)
            if number:
                seconds[subject.name].append(found)
    for subject in subjects:
        rounds = seconds[subject.name]
        for kind in (ALL, *KINDS, OTHER):
            values = [found.get(kind, 0.0) for found in rounds]
            if not any(values):
                continue
            yield BenchRow(
                what=f"profile: {subject.name}",
                subject=kind,
                shapes=dict(setting.size.shapes),
                layers=setting.size.layers,
                p20=percentile(values, 0.2),
                p50=percentile(values, 0.5),
                p80=percentile(values, 0.8),
                n=len(values),
                baseline=ALL,
                ratio=percentile([found.get(kind, 0.0) / found[ALL] for found in rounds], 0.5),
                notes=dict(subject.notes) if kind == ALL else {},
                **fields_of(setting),
            )


def _profiled(subject: Subject) -> dict[str, float]:
    """Seconds by kind of one run, and their sum."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        subject.run()
    found: dict[str, float] = defaultdict(float)
    for event in watched.key_averages():
        found[_KIND_OF.get(event.key, OTHER)] += event.self_cpu_time_total / 1e6
    found[ALL] = sum(found.values())
    return dict(found)
