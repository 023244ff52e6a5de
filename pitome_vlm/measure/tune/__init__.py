"""Find the smallest budget of visual tokens within a loss of quality, on your own questions.

rows = read_rows("my.jsonl")
result = tune(model, processor, rows, max_loss=0.01, folder="tuned")
print(result.statement)
result.save("tuned")
pitome_vlm.wrap(model, config=result.config)
"""

from ..stats import Loss
from .cells import Cell, Event
from .comparison import Comparison
from .plan import Plan
from .recipes import Recipe, default_recipes
from .report import TuneResult
from .rows import Row, read_rows
from .scoring import exact_match, normalise
from .tuner import tune

__all__ = [
    "Cell",
    "Comparison",
    "Event",
    "Loss",
    "Plan",
    "Recipe",
    "Row",
    "TuneResult",
    "default_recipes",
    "exact_match",
    "normalise",
    "read_rows",
    "tune",
]
