"""Which rows of a stored table are measured again."""

from __future__ import annotations

from pitome_vlm import MergeConfig
from scripts.demo import benchmark, stored
from scripts.demo.stored import holds, with_run


def row(config: MergeConfig, **changed) -> dict:
    # A row of before there was a list of changes, and before some options.
    values = {**config.to_dict(), **changed}
    del values["adapt"]
    return {"config": values}


def test_rows_hold_unless_their_options_or_the_meaning_of_these_changed():
    held = {}
    for setting in benchmark.methods(36):
        held[setting.name] = holds(row(setting.config), setting.config)
        now = row(setting.config) | {"changes": len(stored.CHANGES)}
        assert holds(now, setting.config), setting.name
        assert not holds(now, setting.config.replace(tokens=18)), setting.name
        assert not holds(row(setting.config, algorithm="gone"), setting.config), setting.name
    # Since then layers match in the order of the published code, and two merge by default.
    again = [name for name, still in held.items() if not still]
    assert again == [benchmark.RECOMMENDED, "PiToMe (released code)", "ToMe", "ToFu"]
    ours = MergeConfig(tokens=36, algorithm="tome", token_order="raster")
    assert holds(row(ours), ours)


def test_a_table_says_which_rows_a_later_run_measured():
    first = with_run(None, {"cores": 2}, ["a", "b"])
    assert first == {"provenance": {"cores": 2}, "later": []}
    assert with_run(first, {"cores": 2}, ["c"]) == first
    second = with_run(first, {"cores": 8}, ["b", "b"])
    assert second["provenance"] == {"cores": 2}
    assert second["later"] == [{"cores": 8, "rows": ["b"]}]
    third = with_run(second, {"cores": 8}, ["a"])
    assert third["later"] == [{"cores": 8, "rows": ["b", "a"]}]
    assert stored.later_words(third) == ["Measured again later: b, a (cores 8)."]
