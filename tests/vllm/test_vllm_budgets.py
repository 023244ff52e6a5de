"""A budget per request, without vLLM: what is allowed, and how it travels."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from tiny_anyres import anyres_model
from typer.testing import CliRunner

from pitome_vlm import MergeConfig
from pitome_vlm.cli import app
from pitome_vlm.merge.pixels import keep_of
from pitome_vlm.vllm import hf_overrides, plan_serving
from pitome_vlm.vllm.budgets import (
    as_numbers,
    blamed,
    check_fixed,
    check_frames,
    check_side,
    checked,
    from_numbers,
    largest,
    requested,
)


@pytest.fixture(scope="module")
def model_config():
    return tiny_model().config


def plan_of(model_config, max_keep=None, **options):
    """As a server sees it: after JSON, as an attribute of the model's config."""
    config = copy.deepcopy(model_config)
    overrides = hf_overrides(MergeConfig(**{"keep": 0.25, **options}), max_keep=max_keep)
    config.pitome = json.loads(json.dumps(overrides))["pitome"]
    return plan_serving(config)


def test_a_request_s_budget_is_the_config_with_that_budget(model_config):
    plan = plan_of(model_config, max_keep=0.5, algorithm="tome", layers=[1, 3])
    assert requested(plan, None) is plan
    assert requested(plan, {}) is plan
    assert requested(plan, {"algorithm": "tome"}) is plan
    for asked, tokens in (({"keep": 0.5}, 72), ({"keep": 0.1}, 14), ({"tokens": 20}, 20)):
        found = requested(plan, asked)
        assert found.config == plan.config.replace(**asked)
        assert found.schedule.tokens_out == tokens
        assert found.salt != plan.salt
        assert (found.size_bias, found.places) == (plan.size_bias, plan.places)
    # The same budget has the same name, however it came about.
    assert requested(plan, {"keep": 0.25}).salt == plan.salt


def test_options_that_the_weights_fix_stay_as_they_are():
    images = SimpleNamespace(merge_size=2, patch_size=14)
    for processor in (SimpleNamespace(image_processor=images), images):
        check_fixed({"merge_size": 2, "patch_size": 14, "max_pixels": 5, "nonsense": 1}, processor)
        for name, value in (("merge_size", 1), ("patch_size", "x"), ("patch_size", None)):
            with pytest.raises(ValueError, match=f"{name} must be .*, got"):
                check_fixed({name: value}, processor)
            with pytest.raises(ValueError, match=f"{name} must be .*, got"):
                check_fixed({"images_kwargs": {name: value}}, processor)
        for name in ("return_tensors", "input_data_format"):
            for asked in ({name: "np"}, {"common_kwargs": {name: "np"}}):
                with pytest.raises(ValueError, match=f"{name}='np' cannot be set, .* leave it out"):
                    check_fixed(asked, processor)


def test_parts_of_a_processor_that_differ_accept_their_own_values():
    image, video = SimpleNamespace(patch_size=14), SimpleNamespace(patch_size=16)
    processor = SimpleNamespace(image_processor=image, video_processor=video)
    for size in (14, 16):
        check_fixed({"patch_size": size}, processor)
    with pytest.raises(ValueError, match=r"patch_size must be 14, .* got 15"):
        check_fixed({"patch_size": 15}, processor)


def test_options_in_options_are_looked_at_one_level_deep():
    deep = {"patch_size": 5}
    for _ in range(100_000):
        deep = {"images_kwargs": deep}
    check_fixed(deep, SimpleNamespace(patch_size=14))


def test_options_too_deep_to_be_shown_are_refused(model_config):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    plan, processor = plan_of(model_config), SimpleNamespace(patch_size=14)
    for options in (
        {"return_tensors": deep},
        {"patch_size": deep},
        *({"pitome": {word: deep}} for word in ("keep", "tokens", "algorithm", "nonsense")),
        {"pitome": deep},
    ):
        with pytest.raises(ValueError, match=r"mm_processor_kwargs.* (deeply|nonsense|got)"):
            checked(plan, options, processor)
    assert checked(plan, {"size": deep}, processor) is plan


def test_whose_fault_it_is_that_a_request_cannot_be_processed():
    for unplaced in (
        AssertionError("Failed to apply prompt replacement for mm_items['image'][0]"),
        RuntimeError("likely because you forgot to include input placeholder\ntokens"),
    ):
        for options in ({}, {"size": {}}):
            said = blamed(unplaced, options)
            assert said.startswith("the prompt must hold a place for every image")
            assert len(said.splitlines()) == 1
    # A wrong count is the plugin's own fault.
    ours = "Expected there to be 1 prompt placeholders corresponding to 1 image items, but instead "
    assert blamed(RuntimeError(ours + "found 0 prompt placeholders! Make sure"), {}) is None
    assert blamed(KeyError("size"), {}) is None
    assert blamed(RuntimeError("out of memory"), {}) is None


def test_errors_with_options_are_named_with_what_to_do():
    said = blamed(KeyError("size"), {"size": {}, "fps": 1})
    assert said.startswith("mm_processor_kwargs: ")
    assert said.endswith("cannot be processed with size, fps, leave it out (KeyError: 'size')")
    assert "leave it out (AssertionError: )" in blamed(AssertionError(), {"size": {}})
    assert len(blamed(KeyError("x" * 1000), {"y" * 1000: 1})) < 550


def test_a_video_keeps_its_frames():
    for options in ({}, {"do_sample_frames": True, "num_frames": 4}):
        check_frames(4, 4, options)
    for options in ({"num_frames": 2, "size": 1}, {"videos_kwargs": {"num_frames": 2}}):
        with pytest.raises(ValueError, match=r"keep its 4 frames, got 2; leave out num_frames$"):
            check_frames(4, 2, options)
    # No option that the request did not send.
    with pytest.raises(ValueError, match="processor makes 2 frames of a video of 4") as error:
        check_frames(4, 2, {"size": {}})
    assert "mm_processor_kwargs" not in str(error.value)


def test_images_that_options_brought_to_another_size_are_refused():
    for side in (64, [64, 64]):
        check_side(torch.zeros(3, 64, 64), side)
        check_side(torch.zeros(5, 3, 64, 64), side)
        # Patches of any number.
        check_side(torch.zeros(70, 192), side)
        for shape in ((3, 32, 32), (3, 64, 60), (2, 64, 64, 3)):
            with pytest.raises(
                ValueError, match=r"must become 64 x 64 pixels, .* got .* leave out"
            ):
                check_side(torch.zeros(shape), side)
    check_side(torch.zeros(3, 32, 32), None)
    for wrong in (float("nan"), float("inf")):
        for side, shape in ((64, (3, 64, 64)), (None, (70, 192))):
            with pytest.raises(ValueError, match="must be finite; leave out rescale_factor"):
                check_side(torch.full(shape, wrong), side)
    with pytest.raises(ValueError, match="device='meta' holds no pixels; leave it out"):
        check_side(torch.zeros(3, 32, 32, device="meta"), None)


def test_what_travels_with_an_image_leads_back_to_its_budget(model_config):
    for own in ({}, {"keep": None, "tokens": 30}, {"keep": None, "ratio": 0.8}):
        plan = plan_of(model_config, max_keep=1.0, **own)
        for asked in (None, {"keep": 1 / 3}, {"keep": 1.0}, {"tokens": 7}):
            found = requested(plan, asked)
            full, *budget = as_numbers(found, 144).tolist()
            assert full == 144
            assert from_numbers(plan, *budget) == found


REFUSED = [
    (0.5, "must be an object"),
    ({"keep": 0.6}, "keep=0.6 keeps 0.6 of .* this server at most 0.5.*max_keep"),
    ({"tokens": 73}, "tokens=73 keeps 0.5069 of"),
    ({"keep": 0}, r"keep must be in \(0, 1\]"),
    ({"keep": "much"}, "keep must be a number"),
    ({"tokens": 1000}, "tokens must be in 1..144"),
    ({"tokens": 2.5}, "tokens must be a whole number"),
    ({"keep": 0.2, "tokens": 5}, "not both"),
    ({"ratio": 0.9}, "may hold keep, tokens, algorithm, got 'ratio'"),
    ({"keep": 0.2, "seed": 1}, "got 'seed'"),
    ({"keep": 0.2, "algorithm": "tome"}, "must be this server's, 'pitome_plus', got 'tome'"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED, ids=str)
def test_what_a_request_cannot_have_is_one_line(model_config, asked, message):
    with pytest.raises(ValueError, match=message) as error:
        requested(plan_of(model_config, max_keep=0.5), asked)
    text = str(error.value)
    assert text.startswith('mm_processor_kwargs["pitome"]')
    assert "\n" not in text


def test_without_a_maximum_requests_may_ask_for_less(model_config):
    plan = plan_of(model_config)
    assert largest(plan) is None
    assert requested(plan, {"keep": 0.2}).schedule.tokens_out == 29
    with pytest.raises(ValueError, match=r"at most 0.25"):
        requested(plan, {"keep": 0.26})


def test_a_server_that_merges_nothing_is_left_as_it_is_unless_requests_may_ask(model_config):
    plan = plan_of(model_config, keep=1.0)
    assert not plan.merges
    assert requested(plan, {"keep": 1.0}).schedule.is_identity
    with pytest.raises(ValueError, match=r"keep=1, which leaves vLLM as it is.*max_keep=1"):
        requested(plan, {"keep": 0.5})
    open_plan = plan_of(model_config, keep=1.0, max_keep=1.0)
    assert open_plan.is_calibrated
    assert largest(open_plan) == {"keep": 1.0}
    assert requested(open_plan, {"keep": 0.5}).schedule.tokens_out == 72


@pytest.mark.parametrize(
    ("max_keep", "message"),
    [(0, r"max_keep must be in \(0, 1\]"), (1.5, "max_keep must be in"), (0.2, "at least .*0.25")],
)
def test_bad_maxima_stop_the_server(model_config, max_keep, message):
    with pytest.raises(ValueError, match=message):
        plan_of(model_config, max_keep=max_keep)


def test_budgets_that_follow_the_pixels(model_config):
    """A fraction for each image, the one that the library takes; memory for the largest."""
    plan = plan_of(model_config, keep="auto", keep_range=(0.1, 0.5))
    assert largest(plan) == {"keep": 0.5}
    side = model_config.vision_config.image_size
    pixels = torch.ones(1, 3, side, side)
    pixels[:, :, : side // 4] = torch.randn(3, side // 4, side)
    found = plan.for_pixels(pixels)
    assert found.config.keep == keep_of(pixels, plan.patches, (0.1, 0.5))
    assert 0.29 <= found.config.keep < 0.34
    _, *budget = as_numbers(found, 144).tolist()
    assert from_numbers(plan, *budget) == found
    # A request may ask for a fixed budget, and of another server for one by pixels.
    assert requested(plan, {"keep": 0.2}).for_pixels(pixels).config.keep == 0.2
    other = requested(plan_of(model_config, max_keep=0.5), {"keep": "auto"})
    assert other.for_pixels(pixels).config.keep == keep_of(pixels, plan.patches, (0.0625, 0.5))
    # No more than the server keeps.
    small = requested(plan_of(model_config), {"keep": "auto"})
    assert small.config.keep_range == (0.0625, 0.25)
    noise = torch.randn(1, 3, side, side)
    assert small.for_pixels(noise).config.keep == 0.25 < other.for_pixels(noise).config.keep


def test_a_count_that_the_server_itself_keeps_is_allowed(model_config):
    """The fraction that it is of all tokens may be larger by rounding."""
    plan = plan_of(model_config, keep=0.3)
    assert plan.schedule.tokens_out == 43
    assert requested(plan, {"tokens": 43}).schedule.tokens_out == 43
    with pytest.raises(ValueError, match=r"tokens=44 keeps 0.3056 of"):
        requested(plan, {"tokens": 44})
    exact = plan_of(model_config, keep=None, tokens=43, max_keep=0.298)
    assert exact.schedule.tokens_out == 43
    with pytest.raises(ValueError, match="max_keep must be at least"):
        plan_of(model_config, keep=None, tokens=44, max_keep=0.298)


def test_counts_of_tiled_images_follow_the_same_fraction():
    plan = plan_serving(anyres_model("next").config, MergeConfig(keep=0.25), max_keep=0.5)
    assert requested(plan, {"keep": 0.5}).kept == 0.5
    assert requested(plan, {"tokens": 32}).kept == 0.5
    with pytest.raises(ValueError, match=r"tokens=33 keeps 0.5156"):
        requested(plan, {"tokens": 33})


def test_the_command_line_takes_a_maximum():
    words = ["serve-args", "demo", "--keep", "0.25", "--max-keep", "0.5", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["pitome"]["max_keep"] == 0.5
    assert "up to keep=0.5 on request" in result.stderr
    words[5] = "0.1"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "max_keep must be at least" in result.stderr
