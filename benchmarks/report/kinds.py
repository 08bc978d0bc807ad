"""The kinds of results that are reported. A new kind is one line here; tables are in this order."""

from benchmarks import (
    fitting,
    fitting_memory,
    generator,
    inversion,
    inversion_labels,
    label_agreement,
    label_head,
    memory,
    overlap,
    rolling_lanes,
    sample_labels,
    stages,
    synthesis,
    throughput,
)
from benchmarks.downstream import comparison
from benchmarks.gpu import gpu_tests, training, variants
from benchmarks.report.rows import Presentation
from benchmarks.soak import command as soak

KINDS: dict[str, Presentation] = {
    "throughput": throughput.PRESENTATION,
    "synthesis": synthesis.PRESENTATION,
    "label_head": label_head.PRESENTATION,
    "stages": stages.PRESENTATION,
    "overlap": overlap.PRESENTATION,
    "memory": memory.PRESENTATION,
    "soak": soak.PRESENTATION,
    "rolling_lanes": rolling_lanes.PRESENTATION,
    "variants": variants.PRESENTATION,
    "gpu_tests": gpu_tests.PRESENTATION,
    "generator_training": training.PRESENTATION,
    "fitting": fitting.PRESENTATION,
    "fitting_memory": fitting_memory.PRESENTATION,
    "inversion": inversion.PRESENTATION,
    "inversion_labels": inversion_labels.PRESENTATION,
    "generator": generator.PRESENTATION,
    "downstream": comparison.PRESENTATION,
    "label_agreement": label_agreement.PRESENTATION,
    "sample_labels": sample_labels.PRESENTATION,
}
"""Presentation by kind; the kind of a result is its file's name up to the first "-"."""
