"""What measured numbers mean for a user, in sentences; also where merging does not help."""

from __future__ import annotations

from ..provenance import in_words
from .phases import WORTH, Phases, pays_for
from .report import Report, shown

# A first token whose time differs by less than this share is called as fast as before.
NOTICEABLE = 0.03


def verdict(report: Report) -> list[str]:
    """One sentence for every case and budget other than the baseline."""
    return [_about(report, base, one) for base, one in report.pairs() if one is not base]


def page(report: Report) -> str:
    """The whole result in Markdown: sentences, provenance, tables, footnotes."""
    parts = [
        f"# {report.model}",
        *verdict(report),
        in_words(report.setup),
        report.markdown(),
        *report.footnotes(),
    ]
    return "\n\n".join(parts) + "\n"


def _about(report: Report, base: Phases, one: Phases) -> str:
    own, other = one.whole, base.whole
    head = f"{one.budget.name}, batch {one.case.batch} ({base.tokens} -> {one.tokens} tokens): "
    cut = " (at full depth, scaled up)" if one.depth != 1 else ""
    lengths, faster = pays_for(base, one), other.first / own.first
    alike = "; per-token time differs by less than run-to-run noise"
    rest = f"; {_first(faster)}{alike if one.decodes_alike(base) else ''}{_memory(base, one)}"
    rest += f"{_batch(report, base, one)}."
    least = f"{1 / (1 - WORTH):.1f} times faster{cut}"
    if lengths is None:
        return f"{head}does not help: no answer is {least}{rest}"
    reach = "answers of any length"
    if lengths.most is not None:
        reach = f"answers of up to {lengths.most} tokens"
    elif lengths.least > 1:
        reach = f"answers of {lengths.least} tokens and more"
    return f"{head}{reach} are at least {least}{rest}"


def _first(faster: float) -> str:
    if abs(faster - 1) < NOTICEABLE:
        return "the first token takes as long as before"
    if faster > 1:
        return f"the first token comes {faster:.1f} times faster"
    return f"the first token takes {1 / faster:.2f} times as long"


def _memory(base: Phases, one: Phases) -> str:
    before, after = base.kv_bytes / 2**20, one.kv_bytes / 2**20
    width = one.costs.kv_dtype
    return f"; the KV cache shrinks from {shown(before)} to {shown(after)} MiB ({width})"


def _batch(report: Report, base: Phases, one: Phases) -> str:
    before, after = (report.fits.get(x.budget.name) for x in (base, one))
    if before is None or after is None or not after.batch:
        return ""
    how = "" if after.measured else " by formula"
    return f"; {after.batch} prompts fit at a time instead of {before.batch}{how}"
