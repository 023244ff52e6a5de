"""MergeConfig: ranges, JSON, versions."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitome_vlm import MergeConfig
from pitome_vlm.merge.algorithms.pitome import PitomeOptions
from pitome_vlm.merge.config import CONFIG_NAME, FORMAT_VERSION, PRESETS
from pitome_vlm.wrapping.wrap import make_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of keep, tokens, ratio"),
        ({"keep": 0.5, "ratio": 0.9}, "got keep=0.5, ratio=0.9"),
        ({"keep": 0}, r"keep must be in \(0, 1\], got 0"),
        ({"keep": 0.5, "energy": "papr"}, r"energy must be one of paper, elu.*mean 'paper'"),
        ({"keep": 0.5, "stage": "lm"}, "stage must be one of tower, projector, both, got 'lm'"),
        ({"keep": 0.5, "metric": "values"}, "metric must be one of"),
        ({"keep": 0.5, "algorithm": "pitome", "split": None}, "split must be one of"),
        ({"keep": 0.5, "margin": 1.5}, r"margin must be in \[-1, 1\], got 1.5"),
        ({"keep": 0.5, "alpha": -1}, r"alpha must be in \[0, inf\], got -1"),
        ({"keep": 0.5, "tower_share": 1}, r"tower_share must be in \(0, 1\), got 1"),
        ({"keep": 0.5, "algorithm": "pitome", "early_matching": 2}, "early_matching must be in"),
        ({"keep": 0.5, "seed": -1}, "seed must be at least 0, got -1"),
        ({"keep": 0.5, "projector_steps": 0}, "projector_steps must be at least 1"),
        ({"keep": 0.5, "layers": (-1,)}, "layers must be at least 0, got -1"),
        ({"keep": 0.5, "seed": 2**32}, "seed must be at most 4294967295"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MergeConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": "half"},
        {"keep": 0.5, "weighted": 1},
        {"keep": 0.5, "algorithm": "pitome", "protect": "yes"},
        {"keep": 0.5, "seed": 1.5},
        {"keep": 0.5, "margin": "0.9"},
        {"keep": 0.5, "algorithm": 7},
        {"keep": 0.5, "layers": (1.5,)},
        {"keep": 0.5, "layers": 3},
    ],
    ids=str,
)
def test_values_of_the_wrong_type(options):
    with pytest.raises(TypeError, match=list(options)[-1]):
        MergeConfig(**options)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MergeConfig(keep=0.5).keep = 0.2


CONFIGS = st.builds(
    MergeConfig,
    keep=st.floats(0.001, 1),
    algorithm=st.sampled_from(["pitome", "pitome_plus"]),
    stage=st.sampled_from([None, "tower", "projector", "both"]),
    layers=st.none() | st.lists(st.integers(0, 30), min_size=1).map(tuple),
    energy=st.sampled_from(["paper", "elu", "gaussian"]),
    margin=st.none() | st.floats(-1, 1),
    proportional_attention=st.none() | st.booleans(),
    seed=st.integers(0, 2**31),
)


@given(config=CONFIGS)
def test_json_round_trip(config):
    assert MergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_save_and_load_next_to_a_checkpoint(tmp_path):
    config = MergeConfig.preset("released", tokens=54)
    path = config.save_pretrained(tmp_path / "model")
    assert path.name == CONFIG_NAME
    assert MergeConfig.from_pretrained(tmp_path / "model") == config
    assert MergeConfig.from_pretrained(path) == config
    written = json.loads(path.read_text())
    assert written["format_version"] == FORMAT_VERSION
    assert "pitome_vlm_version" in written
    assert os.listdir(tmp_path / "model") == [CONFIG_NAME]


def test_unknown_keys_are_misspellings_in_this_version():
    with pytest.raises(ValueError, match=r"unknown merge option 'marign'.*mean 'margin'"):
        MergeConfig.from_dict({"keep": 0.5, "marign": 0.3})


def test_unknown_keys_of_a_newer_version_are_dropped_with_a_warning():
    values = MergeConfig(keep=0.5).to_dict() | {"format_version": 2, "sparkle": True}
    with pytest.warns(UserWarning, match=r"ignores 'sparkle'. Upgrade pitome-vlm"):
        assert MergeConfig.from_dict(values) == MergeConfig(keep=0.5)


@pytest.mark.parametrize("version", [0, "2", True, None])
def test_a_broken_version_is_said(version):
    with pytest.raises(ValueError, match="format_version must be a whole number"):
        MergeConfig.from_dict({"keep": 0.5, "format_version": version})


@pytest.mark.parametrize("text", ["{", "[1]", '{"keep": 7}', "\x00", '"keep"'])
def test_a_broken_file_names_its_path(tmp_path, text):
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=CONFIG_NAME):
        MergeConfig.from_pretrained(tmp_path)


def test_missing_file_and_file_instead_of_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no merge config at"):
        MergeConfig.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give a folder"):
        MergeConfig(keep=0.5).save_pretrained(tmp_path / "file")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    MergeConfig(keep=0.5).save_pretrained(tmp_path)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        MergeConfig(keep=0.1).save_pretrained(tmp_path)
    assert MergeConfig.from_pretrained(tmp_path).keep == 0.5
    assert os.listdir(tmp_path) == [CONFIG_NAME]


def test_presets():
    paper = MergeConfig(
        keep=0.5, algorithm="pitome", metric="keys", size_bias=False, positions="compact"
    )
    assert MergeConfig.preset("paper", keep=0.5) == paper
    released = MergeConfig.preset("released", ratio=0.9)
    assert released.own(PitomeOptions) == PitomeOptions(energy="elu", early_matching=0.5)
    assert (released.metric, released.weighted) == ("hidden", False)
    paper_energy = MergeConfig.preset("released", keep=0.5, energy="paper")
    assert paper_energy.own(PitomeOptions) == PitomeOptions(early_matching=0.5)
    with pytest.raises(ValueError, match=r"one of paper, released, got 'relased'.*mean"):
        MergeConfig.preset("relased", keep=0.5)
    assert all(MergeConfig(keep=0.5, **fields) for fields in PRESETS.values())


def test_changes_to_a_config():
    config = MergeConfig(keep=0.5, energy="elu")
    assert make_config(config, tokens=10) == MergeConfig(tokens=10, energy="elu")
    assert make_config(config, energy="paper") == MergeConfig(keep=0.5)
    assert config.replace(ratio=0.9) == MergeConfig(ratio=0.9, energy="elu")
    for key in ("format_version", "pitome_vlm_version"):
        with pytest.raises(ValueError, match=f"{key} is set in pitome_config.json"):
            make_config(None, keep=0.5, **{key: 9})
    with pytest.raises(TypeError, match="config must be a MergeConfig, got dict"):
        make_config({"keep": 0.5})


def test_summary_shows_what_differs_from_the_default():
    assert MergeConfig(tokens=64, algorithm="tome", seed=3).summary() == "tome tokens=64 seed=3"


def test_files_of_earlier_versions_load_with_options_of_other_algorithms():
    old = {"format_version": 1, "keep": 0.25, "algorithm": "tome", "energy": "elu"}
    assert MergeConfig.from_dict(old) == MergeConfig(keep=0.25, algorithm="tome")
    del old["format_version"]
    with pytest.raises(ValueError, match="'tome' has no option 'energy'"):
        MergeConfig.from_dict(old)


def test_replacing_the_options_object_replaces_all_of_it():
    config = MergeConfig(keep=0.25, algorithm="pitome", energy="elu", alpha=0.5)
    assert config.replace(options=None) == MergeConfig(keep=0.25, algorithm="pitome")
    own = PitomeOptions(energy="gaussian")
    assert config.replace(options=own) == MergeConfig(keep=0.25, algorithm="pitome", options=own)


def test_no_reduction_needs_no_budget():
    everything = MergeConfig(keep=1.0, algorithm="none")
    assert MergeConfig(algorithm="none") == everything
    assert MergeConfig(tokens=9, seed=3).replace(algorithm="none") == everything.replace(seed=3)
    assert MergeConfig(tokens=9).replace(algorithm="none", keep=0.5).keep == 0.5
