"""Options that belong to one algorithm, and algorithms that come from outside the package."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
import subprocess
import sys
import types

import pytest
import torch
from tiny import tiny_batch, tiny_model

import pitome_vlm
from pitome_vlm import MergeConfig, algorithms
from pitome_vlm.cli.options import merge_options
from pitome_vlm.lmms.arguments import ModelArguments
from pitome_vlm.loading.models import saved_merge_config
from pitome_vlm.measure.evaluate.suites import method_setting
from pitome_vlm.merge import Algorithm, registry
from pitome_vlm.merge.algorithm import MergeContext, make_plan
from pitome_vlm.merge.algorithms.pitome import EnergyOptions, PitomeOptions
from pitome_vlm.merge.algorithms.tofu import TofuOptions
from pitome_vlm.merge.config import CONFIG_NAME, SHARED, option_names
from pitome_vlm.vllm import hf_overrides, plan_serving

MODULE = '''
"""An algorithm as another package would bring it: keeps the first or the last tokens."""

from dataclasses import dataclass

import torch

from pitome_vlm.common import check_flag
from pitome_vlm.merge import Algorithm, MergeContext, MergePlan


@dataclass(frozen=True)
class EdgeOptions:
    at_end: bool = False

    def __post_init__(self):
        check_flag("at_end", self.at_end)


def plan(keys, n_out, *, ctx: MergeContext) -> MergePlan:
    order = torch.arange(keys.shape[1]).expand(len(keys), -1)
    if ctx.own(EdgeOptions).at_end:
        order = order.flip(1)
    others = order[:, n_out:]
    return MergePlan.from_pairs(keys.shape[1], others, order[:, :1].expand_as(others))


ALGORITHM = Algorithm("edge", plan, "a test", pairwise=False, options=EdgeOptions)
'''
METADATA = "Metadata-Version: 2.1\nName: edges\nVersion: 0.1\n"


def install(folder, entry_points: str, **modules: str) -> None:
    """A distribution as pip leaves it in a folder."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    info = folder / "edges-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(f"[pitome_vlm.algorithms]\n{entry_points}\n")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder on sys.path; what was registered or imported from it is forgotten afterwards."""
    known, modules = dict(registry._known), set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    registry._known.clear()
    registry._known.update(known)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


NOTEBOOK_CELL = """
from dataclasses import dataclass
import torch
from pitome_vlm.algorithms import Algorithm, MergePlan, register

@dataclass(frozen=True)
class Options:
    {option}: int = 0

def plan(keys, n_out, *, ctx):
    called.append(("{option}", ctx.own(Options).{option}))
    return MergePlan.from_assignment((torch.arange(20) % n_out)[None], n_out)

register(Algorithm(name="from_a_cell", plan=plan, source="here", pairwise=False, options=Options))
"""


def test_the_cell_of_a_notebook_that_registers_can_run_again(outside):
    called: list = []
    space = {"__name__": "notebook", "called": called}

    def run_cell(option):
        # Without this module's own `from __future__`.
        exec(compile(NOTEBOOK_CELL.format(option=option), "cell", "exec", dont_inherit=True), space)

    run_cell("shift")
    config = MergeConfig(tokens=4, algorithm="from_a_cell", shift=2)

    def planned(config):
        keys = torch.randn(1, 20, 4)
        make_plan(algorithms.get("from_a_cell"), keys, 4, ctx=MergeContext(config))
        return called.pop()

    assert planned(config) == ("shift", 2)
    run_cell("shift")
    # What was made before the cell ran again keeps its options.
    assert planned(config) == planned(config.replace(seed=1)) == ("shift", 2)
    run_cell("offset")
    assert planned(MergeConfig(tokens=4, algorithm="from_a_cell", offset=3)) == ("offset", 3)
    space["__name__"] = "another"
    with pytest.raises(ValueError, match=r"already registered, with the .* notebook\.plan; give"):
        run_cell("shift")


@pytest.fixture(params=["register", "entry point", "entry point of a module"])
def edge(request, outside):
    """An algorithm with an option, made known in each of the ways there are."""
    if request.param == "register":
        module = types.ModuleType("edges_by_hand")
        sys.modules["edges_by_hand"] = module
        exec(MODULE, module.__dict__)
        algorithms.register(module.ALGORITHM)
        yield module
        del sys.modules["edges_by_hand"]
        return
    target = "edges" if "module" in request.param else "edges:ALGORITHM"
    install(outside, f"edge = {target}", edges=MODULE)
    yield importlib.import_module("edges")


def test_an_algorithm_from_outside_is_seen_everywhere(edge, tmp_path):
    config = MergeConfig(tokens=9, algorithm="edge", at_end=True)
    assert algorithms.get("edge") is edge.ALGORITHM
    assert "edge" in algorithms.available()
    assert config.own(edge.EdgeOptions) == edge.EdgeOptions(at_end=True)
    assert str(config) == "MergeConfig(tokens=9, algorithm='edge', at_end=True)"
    # Python: its option decides which tokens stay.
    model, pixels = tiny_model(), tiny_batch("clip", (1,), (3,))["pixel_values"]
    for at_end, stays in ((False, 0), (True, 143)):
        merged = pitome_vlm.wrap(
            model, tokens=9, algorithm="edge", at_end=at_end, stage="projector"
        )
        anchors = pitome_vlm.encode_images(merged, pixels).anchors[0].tolist()
        assert len(anchors) == 9
        assert anchors[0 if stays == 0 else -1] == stays
    # Saved settings next to a checkpoint.
    config.save_pretrained(tmp_path / "model")
    assert MergeConfig.from_pretrained(tmp_path / "model") == config
    assert saved_merge_config(str(tmp_path / "model")) == config
    # Command line, evaluation and lmms-eval.
    given = {"tokens": 9, "algorithm": "edge", "at_end": True}
    assert merge_options(tokens=9, algorithm="edge", option=["at_end=true"]) == given
    assert method_setting("edge:at_end=true", 9).config == config
    assert ModelArguments.parse({"pretrained": "x", **given}).merging == given
    # Serving.
    overrides = hf_overrides(config)
    assert overrides["pitome"]["at_end"] is True
    served = tiny_model().config
    served.pitome = overrides["pitome"]
    plan = plan_serving(served)
    assert plan.config.own(edge.EdgeOptions).at_end
    assert plan.salt != plan_serving(served, config.replace(at_end=False)).salt
    # Mistakes are named like everybody's.
    with pytest.raises(ValueError, match=r"unknown merge option 'at_ned'.*mean 'at_end'"):
        MergeConfig(tokens=9, algorithm="edge", at_ned=True)
    with pytest.raises(TypeError, match="at_end must be True or False, got 1"):
        MergeConfig(tokens=9, algorithm="edge", at_end=1)
    with pytest.raises(ValueError, match=r"'tome' has no option 'at_end'.*belongs to edge"):
        MergeConfig(tokens=9, algorithm="tome", at_end=True)


def test_a_file_that_names_an_unknown_algorithm_is_named(tmp_path):
    text = '{"keep": 0.5, "algorithm": "edge", "at_end": true}'
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match="unknown algorithm 'edge'") as caught:
        MergeConfig.from_pretrained(tmp_path)
    said = str(caught.value)
    assert said.startswith(str(tmp_path / CONFIG_NAME))
    assert "'pitome_vlm.algorithms'" in said
    assert "pitome_vlm.algorithms.register(" in said


def test_a_broken_package_takes_nothing_down(outside):
    install(
        outside,
        "broken = broken_edges\nnothing = edges:nothing\nother = edges\nedge = edges",
        edges=MODULE + "nothing = 7\n",
        broken_edges="import a_module_that_is_not_there",
    )
    assert MergeConfig(keep=0.5, algorithm="broken").algorithm == "broken"
    with pytest.raises(ValueError, match=r"'broken' of edges 0.1 .*ModuleNotFoundError.*not_there"):
        algorithms.get("broken")
    with pytest.raises(ValueError, match=r"'nothing'.* is int; it must be an Algorithm named"):
        algorithms.get("nothing")
    with pytest.raises(ValueError, match=r"'other'.* is an algorithm named 'edge'; it must be"):
        algorithms.get("other")
    with pytest.warns(UserWarning, match="algorithm") as warned:
        assert algorithms.available() == sorted([*registry._built_in(), "edge"])
    assert sorted(str(one.message).split("'")[1] for one in warned) == [
        "broken",
        "nothing",
        "other",
    ]


def test_built_in_modules_are_named_like_their_algorithms():
    for name in registry._built_in():
        assert algorithms.get(name).name == name
    assert len(registry._built_in()) >= 10


def test_names_and_plain_configs_need_no_torch():
    code = (
        "import sys; from pitome_vlm.merge import registry; from pitome_vlm import MergeConfig; "
        "config = MergeConfig(keep=0.5, algorithm='tome'); assert 'pitome' in registry.names(); "
        "assert 'torch' not in sys.modules; print(config)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "MergeConfig(keep=0.5, algorithm='tome')\n", done.stderr


def test_options_of_other_algorithms():
    # Files of older versions list the options of all algorithms, at their defaults.
    old = {"energy": "paper", "alpha": 1.0, "margin": None, "split": "ordered", "protect": True}
    for name in ("pitome_plus", "tome", "none"):
        values = {"keep": 1.0, "algorithm": name, **old, "early_matching": 0.0}
        assert MergeConfig.from_dict(values) == MergeConfig(keep=1.0, algorithm=name)
    with pytest.raises(ValueError, match=r"'tome' has no option 'energy', got energy='elu'; it be"):
        MergeConfig(keep=0.5, algorithm="tome", energy="elu")
    with pytest.raises(ValueError, match=r"'pitome_plus' has no option 'split'.* pitome$"):
        MergeConfig(keep=0.5, split="random")
    with pytest.raises(ValueError, match="'tome' has no option 'protect', got protect=1"):
        MergeConfig(keep=0.5, algorithm="tome", protect=1)


def test_a_config_with_own_options_is_a_value():
    config = MergeConfig(keep=0.5, algorithm="pitome", energy="elu", protect=False)
    assert repr(config) == (
        "MergeConfig(keep=0.5, algorithm='pitome', energy='elu', protect=False)"
    )
    assert repr(MergeConfig(keep=0.25, algorithm="tome")) == (
        "MergeConfig(keep=0.25, algorithm='tome')"
    )
    assert config.summary() == "pitome keep=0.5 energy=elu protect=False"
    assert eval(repr(config)) == config
    for same in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        dataclasses.replace(config),
        MergeConfig(keep=0.5, algorithm="pitome", options={"energy": "elu"}, protect=False),
        MergeConfig(keep=0.5, algorithm="pitome", options=PitomeOptions("elu", protect=False)),
    ):
        assert same == config
        assert hash(same) == hash(config)
    assert config != config.replace(protect=True)
    # Another algorithm takes over what it has too.
    plus = config.replace(algorithm="pitome_plus")
    assert plus.own(EnergyOptions) == EnergyOptions("elu")
    assert config.replace(algorithm="tome").options is None
    assert config.replace(algorithm="tofu", pruning_depth=0.2).own(TofuOptions).pruning_depth == 0.2
    # All at their defaults is the same as none given.
    assert MergeConfig(keep=0.5, algorithm="pitome", options=PitomeOptions()).options is None
    assert config.to_dict()["split"] == "ordered"
    with pytest.raises(TypeError, match=r"options of algorithm 'tofu' must be TofuOptions\("):
        MergeConfig(keep=0.5, algorithm="tofu", options=PitomeOptions(energy="elu"))


def test_names_of_options():
    assert option_names("divprune") == list(SHARED)
    assert option_names("tofu") == [*SHARED, "token_order", "pruning_depth"]
    assert {"energy", "split", "pruning_depth"} <= set(option_names())
    # Without an algorithm the checkpoint may name one that has the option.
    assert merge_options(option=["split=random"]) == {"split": "random"}
    with pytest.raises(ValueError, match="unknown merge option 'splt'"):
        merge_options(option=["splt=random"])


def test_an_algorithm_may_not_take_shared_names():
    plan = algorithms.get("tome").plan

    @dataclasses.dataclass(frozen=True)
    class Seeded:
        seed: int = 1

    with pytest.raises(ValueError, match="'x' has an option 'seed', which all algorithms share"):
        Algorithm("x", plan, "a test", options=Seeded)
    with pytest.raises(TypeError, match="options of algorithm 'x' must be a frozen dataclass"):
        Algorithm("x", plan, "a test", options=dict)
