"""What measured numbers mean for a user, in sentences, also where merging does not help.

Knows: the numbers of a report. Does not know: how they were made.
"""

from __future__ import annotations

from .phases import WORTH, Phases, pays_for
from .report import Report, shown

# Below this much of a difference a first token is not called sooner or later.
NOTICEABLE = 0.03


def verdict(report: Report) -> list[str]:
    """One sentence for every budget and case but the ones compared with."""
    return [_about(report, base, one) for base, one in report.pairs() if one is not base]


def _about(report: Report, base: Phases, one: Phases) -> str:
    own, other = one.whole, base.whole
    head = f"{one.budget.name}, batch {one.case.batch} ({base.tokens} -> {one.tokens} tokens): "
    cut = " (at the whole depth, scaled up)" if one.depth != 1 else ""
    lengths, sooner = pays_for(base, one), other.first / own.first
    alike = "; a further token differs by less than rounds do" if one.decodes_alike(base) else ""
    if lengths is None:
        start = f"{head}does not help: no answer gets {WORTH:.0%} faster{cut}"
        return f"{start}; {_first(sooner)}{alike}{_memory(base, one)}{_batch(report, base, one)}."
    reach = "answers of any length"
    if lengths.most is not None:
        reach = f"answers of up to {lengths.most} tokens"
    elif lengths.least > 1:
        reach = f"answers of {lengths.least} tokens and more"
    text = f"{head}{reach} get at least {WORTH:.0%} faster{cut}; {_first(sooner)}{alike}"
    return f"{text}{_memory(base, one)}{_batch(report, base, one)}."


def _first(sooner: float) -> str:
    if abs(sooner - 1) < NOTICEABLE:
        return "the first token comes as soon as before"
    if sooner > 1:
        return f"the first token comes {sooner:.1f} times sooner"
    return f"the first token comes later, {1 / sooner:.2f} times the time"


def _memory(base: Phases, one: Phases) -> str:
    before, after = base.kv_bytes / 2**20, one.kv_bytes / 2**20
    return f"; the KV cache shrinks from {shown(before)} to {shown(after)} MiB"


def _batch(report: Report, base: Phases, one: Phases) -> str:
    before, after = (report.fits.get(x.budget.name) for x in (base, one))
    if before is None or after is None or not after.batch:
        return ""
    how = "" if after.measured else " by formula"
    return f"; {after.batch} prompts fit at a time instead of {before.batch}{how}"
