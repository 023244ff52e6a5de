"""Will it help me? Times of a model with and without merging, in one process.

Knows: published shapes, phases of an answer, fair timing, what a number needs beside it. Does not
know: terminals (`cli/bench.py`), accuracy.
"""

from .flops import counted_over_formula
from .measurement import Bench, Budget, installed, measure
from .memory import fitting_batch, largest_batch
from .phases import Estimate, Lengths, Phases, break_even, iqr, median, pays_for
from .plots import check_plot, plot
from .prompts import Case, inputs_for
from .report import Report
from .shapes import SHAPES, build, configuration, needed_bytes
from .words import verdict

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
    "check_plot",
    "configuration",
    "counted_over_formula",
    "fitting_batch",
    "inputs_for",
    "installed",
    "iqr",
    "largest_batch",
    "measure",
    "median",
    "needed_bytes",
    "pays_for",
    "plot",
    "verdict",
]
