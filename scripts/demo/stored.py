"""Which rows of a results.json still hold, so that only the others are measured again.

A row holds while its method has the same configuration as when it was measured, and no entry of
`CHANGES` since then is about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pitome_vlm import MergeConfig

Predicate = Callable[[MergeConfig], bool]


def _matches_alternately(config: MergeConfig) -> bool:
    own = config.to_dict()
    published = own["algorithm"] in ("tome", "tofu") and own["token_order"] == "reference"
    return published or own.get("early_matching", 0) > 0


def _merges_in_rounds(config: MergeConfig) -> bool:
    """Of the bundled model's 7 merging layers of 144 tokens, which lose over a quarter at once."""
    if config.algorithm != "pitome_plus" or config.stage == "projector" or not config.tokens:
        return False
    share = 1.0 if config.stage == "tower" else config.tower_share or 2 / 3
    layers = len(config.layers) if config.layers else 7
    return bool((144 / config.tokens) ** (share / layers) > 4 / 3)


def _merges_where_none_are_named(config: MergeConfig) -> bool:
    named = config.layers is not None or config.ratio is not None
    both = config.stage in (None, "both")
    return config.algorithm == "pitome_plus" and both and not named


# What came to mean something else under the same configuration, and for which. New entries go to
# the end: a row stores how many there were.
CHANGES: tuple[tuple[str, Predicate], ...] = (
    ("layers match in the order of the published code, not in raster order", _matches_alternately),
    ("steps over a quarter of the tokens are made in rounds", _merges_in_rounds),
    ("two layers merge where none are named, not all", _merges_where_none_are_named),
    ("those two are later ones", _merges_where_none_are_named),
)


def holds(stored: Mapping[str, Any], config: MergeConfig) -> bool:
    """Whether a row that was measured is what the configuration gives now.

    Args:
        stored: with its "config" (of `MergeConfig.to_dict`; options that are missing are at their
            defaults) and "changes", the number of entries of `CHANGES` at that time.
        config: that of its method now.
    """
    try:
        before = MergeConfig.from_dict(stored["config"])
    except ValueError:
        return False  # an algorithm or option that there no longer is
    later = CHANGES[stored.get("changes", 0) :]
    return before == config and not any(concerns(config) for _, concerns in later)


def with_run(
    results: Mapping[str, Any] | None, facts: Mapping[str, Any], rows: Iterable[str]
) -> dict[str, Any]:
    """The provenance of results of which some rows were measured again.

    Args:
        results: as stored; None, or without a "provenance", where all rows are new.
        facts: of this run.
        rows: names of what it measured.

    Returns:
        "provenance" of the first run and "later", a list of the facts of the others, each with its
        "rows". Runs of the same facts are one.
    """
    if results is None or "provenance" not in results:
        return {"provenance": facts, "later": []}
    later = [dict(one) for one in results.get("later", [])]
    if facts == results["provenance"]:
        return {"provenance": facts, "later": later}
    names = list(dict.fromkeys(rows))
    for one in later:
        if {**facts, "rows": None} == {**one, "rows": None}:
            one["rows"] = list(dict.fromkeys([*one["rows"], *names]))
            break
    else:
        later.append({**facts, "rows": names})
    return {"provenance": results["provenance"], "later": later}


def later_words(results: Mapping[str, Any]) -> list[str]:
    """A sentence for every run after the first."""
    found = []
    for one in results.get("later", []):
        facts = ", ".join(f"{name} {value}" for name, value in one.items() if name != "rows")
        found.append(f"Measured again later: {', '.join(one['rows'])} ({facts}).")
    return found
