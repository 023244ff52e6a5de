"""How much faster is a model with merging? Both are timed in one process, in turns.

Handles published shapes, the phases of an answer, fair timing and the provenance of every number.
Leaves terminals to `cli/bench.py` and accuracy to `measure.evaluate`.
"""

from .flops import counted_over_formula
from .measurement import Bench, installed, measure
from .memory import fitting_batch, largest_batch
from .phases import Estimate, Lengths, Phases, break_even, median, pays_for
from .plots import plot
from .prompts import Budget, Case, inputs_for
from .report import Report
from .shapes import SHAPES, build, configuration, needed_bytes
from .words import page, verdict

__all__ = [
    "SHAPES",
    "Bench",
    "Budget",
    "Case",
    "Estimate",
    "Lengths",
    "Phases",
    "Report",
    "break_even",
    "build",
    "configuration",
    "counted_over_formula",
    "fitting_batch",
    "inputs_for",
    "installed",
    "largest_batch",
    "measure",
    "median",
    "needed_bytes",
    "page",
    "pays_for",
    "plot",
    "verdict",
]
