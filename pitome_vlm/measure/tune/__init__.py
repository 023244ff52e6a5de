"""Find the smallest budget of visual tokens within a loss of quality, on your own questions.

    rows = read_rows("my.jsonl")
    result = tune(model, processor, rows, max_loss=0.01, folder="tuned")
    print(result.statement)
    result.save("tuned")
    pitome_vlm.wrap(model, config=result.config)

Knows: questions, answers, budgets, and how sure a claim about them is. Does not know: the command
line, the demo, lmms-eval, or what an algorithm does.
"""

from .asking import chat_prompt
from .bench import Cell, Event
from .intervals import Loss, relative_loss
from .recipes import Recipe, default_recipes
from .result import TuneResult
from .rows import Row, read_rows
from .scoring import exact_match, normalise
from .tuner import Plan, tune

__all__ = [
    "Cell",
    "Event",
    "Loss",
    "Plan",
    "Recipe",
    "Row",
    "TuneResult",
    "chat_prompt",
    "default_recipes",
    "exact_match",
    "normalise",
    "read_rows",
    "relative_loss",
    "tune",
]
