"""The benchmark: its arithmetic, fair timing, published shapes, and what is written."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from original_llava import original_model
from tiny import tiny_model
from tiny_anyres import anyres_model
from tiny_qwen import IMAGE, START, qwen
from tiny_video import video_model

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.bench import (
    Bench,
    Budget,
    Case,
    Estimate,
    Lengths,
    Phases,
    Report,
    break_even,
    build,
    configuration,
    counted_over_formula,
    fitting_batch,
    inputs_for,
    largest_batch,
    measure,
    median,
    needed_bytes,
    page,
    pays_for,
    plot,
    verdict,
)
from pitome_vlm.measure.bench.memory import is_computable, search_largest
from pitome_vlm.measure.bench.report import Fit
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.wrapping.encode import planned_count
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config

QUARTER = Budget("quarter", MergeConfig(keep=0.25))
NONE = Budget("none")


def phases(first, decode, *, budget=NONE, depth=1.0, inside=0.0, steps=10, batch=1):
    found = Phases(budget, Case(batch, answer_tokens=steps), 144, costs(tiny_model()), depth=depth)
    found.add(
        {"first": first, "decode": decode, "prefill": first / 2, "answer": first + 9 * decode}
        | {"tower": first / 2, "merge": 0.0, "projector": 0.0, "prompt": 0.0}
        | {"prefill_layers": inside * first / 2, "decode_layers": inside * decode}
    )
    return found


# --- arithmetic


def test_median_of_nothing_is_0():
    assert (median([3.0, 1.0, 2.0]), median([])) == (2.0, 0.0)


def test_break_even_is_where_a_tenth_is_saved():
    base, merged = Estimate(100.0, 50.0, 10.0), Estimate(50.0, 20.0, 10.0)
    longest = break_even(base, merged).most
    assert longest > 1
    assert merged.total(longest) <= 0.9 * base.total(longest)
    assert merged.total(longest + 1) > 0.9 * base.total(longest + 1)
    assert break_even(base, Estimate(50.0, 20.0, 8.0)) == Lengths(1, None)
    for never in (Estimate(99.0, 49.0, 10.0), base, Estimate(99.0, 49.0, 9.0)):
        assert break_even(base, never) is None


def test_what_decodes_faster_pays_from_some_length_on():
    base, merged = Estimate(100.0, 50.0, 10.0), Estimate(95.0, 45.0, 5.0)
    found = break_even(base, merged)
    assert found.most is None
    assert merged.total(found.least) <= 0.9 * base.total(found.least)
    assert merged.total(found.least - 1) > 0.9 * base.total(found.least - 1)
    assert str(found) == f"from {found.least}"


def test_only_the_time_inside_layers_is_scaled_to_the_whole_depth():
    one = phases(100.0, 10.0, depth=8.0, inside=0.5)
    assert one.measured == Estimate(100.0, 50.0, 10.0)
    assert one.whole == Estimate(100.0 + 7 * 25.0, 50.0 + 7 * 25.0, 10.0 + 7 * 5.0)
    assert one.whole.total(1) == one.whole.first
    assert one.kv_bytes == 8 * one.costs.kv_bytes
    assert phases(100.0, 10.0, inside=0.5).whole == Estimate(100.0, 50.0, 10.0)


@pytest.mark.parametrize("true", [0, 1, 2, 7, 63, 64, 500, 1024])
@pytest.mark.parametrize("guess", [1, 30, 4000])
def test_largest_batch_is_found_within_a_sixteenth(true, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= true

    found = search_largest(fits, 1024, guess)
    assert found <= true
    assert true - found <= found // 16
    assert max(tried, default=0) <= 1024
    assert len(tried) < 40


def test_sentences_say_when_it_helps_and_when_not():
    config = MergeConfig(keep=0.25)
    base = phases(100.0, 10.0)
    good = phases(40.0, 10.0, budget=Budget("good", config))
    bad = phases(110.0, 10.0, budget=Budget("bad", config))
    any_length = phases(40.0, 5.0, budget=Budget("any", config))
    later = phases(95.0, 5.0, budget=Budget("later", config))
    report = Report("x", [[base, good, bad, any_length, later]])
    helps, not_at_all, always, long_ones = verdict(report)
    assert helps.startswith("good, batch 1")
    assert "answers of up to 51 tokens are at least 1.1 times faster" in helps
    assert "the first token comes 2.5 times faster" in helps
    assert "does not help" in not_at_all
    assert "the first token takes 1.10 times as long" in not_at_all
    assert "answers of any length" in always
    assert "answers of 3 tokens and more are at least 1.1 times faster" in long_ones


def test_noise_of_decoding_decides_about_no_answer():
    """A further token that is faster in one round and slower in the next is as fast."""
    base, noisy, faster = (phases(100.0, 10.0, budget=b) for b in (NONE, QUARTER, QUARTER))
    noisy.rounds["first"][0] = faster.rounds["first"][0] = 40.0
    for one, times in ((base, (12, 10, 12)), (noisy, (9, 12, 9)), (faster, (9, 7, 9))):
        for time in times:
            one.add({name: values[0] for name, values in one.rounds.items()} | {"decode": time})
    assert (base.median("decode"), noisy.median("decode")) == (11, 9.5)
    assert noisy.decodes_alike(base)
    assert not faster.decodes_alike(base)
    # (0.9 x 100 - 40) / (11 - 0.9 x 11) further tokens.
    assert pays_for(base, noisy) == Lengths(1, 1 + math.floor(50 / 1.1))
    assert pays_for(base, faster) == Lengths(1, None)
    sentence, _ = verdict(Report("x", [[base, noisy, faster]]))
    assert "answers of up to 46 tokens" in sentence
    assert "per-token time differs by less than run-to-run noise" in sentence


# --- published shapes


@pytest.mark.parametrize(
    ("name", "billions", "width", "layers", "full"),
    [
        # Parameters as the Hub counts the safetensors of llava-hf/llava-1.5-7b-hf, -13b-hf,
        # llava-v1.6-vicuna-7b-hf, llava-onevision-qwen2-7b-ov-hf and Qwen2.5-VL-7B-Instruct;
        # tokens of a 672 x 672 image: 576; 576 + 48 x (48 + 1); 729 + 54 x (54 + 1); 24 x 24.
        ("llava-1.5-7b", 7.063, 4096, 32, 576),
        ("llava-1.5-13b", 13.351, 5120, 40, 576),
        ("llava-next-7b", 7.063, 4096, 32, 2928),
        ("onevision-7b", 8.030, 3584, 28, 3699),
        ("qwen2.5-vl-7b", 8.292, 3584, 28, 576),
    ],
)
def test_presets_have_the_published_shape(name, billions, width, layers, full):
    model = build(name, dtype=torch.bfloat16, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=5e-4)
    assert needed_bytes(name, dtype=torch.bfloat16) == 2 * parameters
    text = model.config.text_config
    assert (text.hidden_size, text.num_hidden_layers) == (width, layers)
    footprint, count = planned_count(model, MergeConfig(keep=0.25), image_size=(672, 672))
    assert footprint.full == full
    assert count.out == round(full / 4)


def test_layers_cut_the_language_model_alone():
    whole, cut = configuration("onevision-7b"), configuration("onevision-7b", layers=3)
    assert cut.text_config.num_hidden_layers == 3
    assert cut.vision_config.num_hidden_layers == whole.vision_config.num_hidden_layers == 26
    for layers, message in ((0, "at least 1"), (29, "at most 28")):
        with pytest.raises(ValueError, match=message):
            configuration("onevision-7b", layers=layers)
    with pytest.raises(ValueError, match=r"Did you mean 'llava-1.5-7b'"):
        configuration("llava-1.5-7")


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("pitome_vlm.measure.bench.shapes.free_bytes", lambda device: 2**20)
    with pytest.raises(MemoryError, match=r"takes 49.7 GiB and cpu has 0.0 GiB free.*--layers"):
        build("llava-1.5-13b")


# --- timing


@pytest.mark.parametrize(
    "make",
    [
        lambda: build("tiny"),
        lambda: build("tiny-next"),
        lambda: build("tiny-onevision"),
        lambda: build("tiny-qwen2.5-vl"),
        lambda: tiny_model("vipllava"),
        lambda: tiny_model("siglip"),
        lambda: anyres_model("next_list"),
        lambda: video_model("next_video"),
        lambda: video_model("video_llava"),
        lambda: qwen("qwen2_vl"),
        lambda: qwen("qwen2_5_vl"),
    ],
    ids=[
        *("llava", "next", "onevision", "qwen", "vipllava", "siglip", "next_list"),
        *("next_video", "video_llava", "qwen2_vl", "qwen2_5_vl"),
    ],
)
def test_phases_of_every_family_add_up(make):
    model = make()
    case = Case(2, 8, 3, image_size=(90, 140))
    none, merged = measure(model, [NONE, QUARTER], case, repeats=2, warmup=0)
    parts = ("tower", "merge", "projector", "prompt", "prefill")
    for one in (none, merged):
        assert all(len(values) == 2 for values in one.rounds.values())
        for index in range(2):
            whole = sum(one.rounds[name][index] for name in parts)
            assert whole == pytest.approx(one.rounds["first"][index])
            assert one.rounds["prefill_layers"][index] < one.rounds["prefill"][index]
            assert one.rounds["decode_layers"][index] < one.rounds["decode"][index]
            assert one.rounds["first"][index] < one.rounds["answer"][index]
            assert min(one.rounds[name][index] for name in ("prompt", "prefill")) > 0
            # Qwen's patch merger is a part of its tower.
            assert (one.rounds["projector"][index] == 0) == model.config.model_type.startswith(
                "qwen"
            )
    assert none.rounds["merge"] == [0.0, 0.0]
    assert min(merged.rounds["merge"]) > 0
    full, count = planned_count(model, QUARTER.config, image_size=(90, 140))
    assert (none.tokens, merged.tokens) == (full.full, count.out)
    assert not is_wrapped(model)


def test_budgets_take_turns():
    model, order = build("tiny"), []
    budgets = [NONE, QUARTER, Budget("half", MergeConfig(keep=0.5))]

    def note(*_):
        order.append(merge_config(model).keep if is_wrapped(model) else None)

    model.model.vision_tower.register_forward_pre_hook(note)
    rounds = []
    measure(
        model,
        budgets,
        Case(1, 8, 2),
        repeats=2,
        warmup=1,
        progress=lambda done, of: rounds.append((done, of)),
    )
    assert order == [None, 0.25, 0.5] * 3
    assert rounds == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_on_the_model_after_an_error(error):
    model, calls = build("tiny"), []
    # transformers itself leaves hooks on a model that has run.
    measure(model, [NONE], Case(1, 8, 2), repeats=1, warmup=0)
    before = hooks_on(model)

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:
            raise error

    handle = model.model.vision_tower.register_forward_pre_hook(fail)
    bench = Bench(model, [NONE, Budget("half", MergeConfig(keep=0.5)), QUARTER], Case(1, 8, 2))
    with pytest.raises(error):
        bench.run(repeats=4, warmup=0)
    assert not is_wrapped(model)
    # The round that was broken off is left out everywhere.
    assert [one.repeats for one in bench.results] == [1, 1, 1]
    handle.remove()
    assert hooks_on(model) == before


def hooks_on(model):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())


def test_bench_refuses_what_it_cannot_time():
    model = build("tiny")
    with pitome_vlm.wrapped(model, keep=0.5), pytest.raises(ValueError, match="unwrap"):
        measure(model, [NONE], Case())
    with pytest.raises(ValueError, match="tokens"):
        measure(model, [Budget("x", MergeConfig(tokens=145))], Case())
    assert not is_wrapped(model)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measure(model, [NONE], Case(), repeats=0)
    with pytest.raises(ValueError, match="on a CPU"):
        largest_batch(model, NONE, Case())
    with pytest.raises(TypeError, match="does not know how to ask"):
        inputs_for(original_model(), Case())
    for name in ("batch", "images"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Case(**{name: 0})
    for name in ("text_tokens", "answer_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 2"):
            Case(**{name: 1})


def test_the_same_images_and_words_every_time():
    model = build("tiny-next")
    one, two = (inputs_for(model, Case(2, 8, image_size=(90, 140))) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = inputs_for(model, Case(2, 8, image_size=(90, 140)), seed=1)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_every_image_comes_after_a_token_of_text():
    row = inputs_for(build("tiny"), Case(1, 8, images=2))["input_ids"][0]
    placeholders = (row == row.mode().values).tolist()
    assert placeholders == [False, *[True] * 144, False, *[True] * 144, *[False] * 6]
    with pytest.raises(ValueError, match=r"text_tokens must be more than images \(2\)"):
        Case(1, 2, images=2)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_finds_the_images_it_is_asked_about(kind):
    model, case = qwen(kind), Case(2, 8, images=2, image_size=(90, 140))
    inputs = inputs_for(model, case)
    ids = inputs["input_ids"]
    assert (ids == START).sum(1).tolist() == [2, 2]
    assert (ids == IMAGE).sum(1).tolist() == [30, 30]
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 10]] * 4
    places = find_adapter(model).prompt_places(model, inputs, inputs["attention_mask"])
    assert not is_computable(model)
    assert counted_over_formula(model, NONE, case) == pytest.approx(1, abs=0.01)
    # Rows and columns start anew in the second image, after the token between the two.
    for first in (1, 17):
        rows = places[0, first : first + 15, 1]
        assert (rows - rows[0]).tolist() == [row for row in range(3) for _ in range(5)]


def test_more_prompts_fit_where_tokens_are_merged():
    model = build("llava-1.5-7b", dtype=torch.float16, device="meta")
    found = []
    for budget in (NONE, Budget("64", MergeConfig(tokens=64))):
        with pitome_vlm.wrapped(model, config=budget.config or MergeConfig(keep=1.0)):
            result = Phases(budget, Case(answer_tokens=64), 0, costs(model))
        found.append(fitting_batch(model, result, 24 * 2**30, torch.float16))
        assert fitting_batch(model, result, 8 * 2**30, torch.float16) == 0
    # 24 GiB less 13.2 GiB of weights, over 0.5 MiB of cache per token and the activations.
    assert 20 <= found[0] <= 29
    assert found[1] > 2 * found[0]


@pytest.mark.parametrize("message", ["CUDA out of memory.", "cublas CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_batch_that_fitted_once_and_no_more_is_made_smaller(monkeypatch, message):
    from pitome_vlm.measure.bench import fits

    model, asked = build("tiny"), []
    (result,) = measure(model, [NONE], Case(1, 8, 2), repeats=1, warmup=0)

    def timed(model, budgets, case, **options):
        asked.append(case.batch)
        if case.batch > 13:
            raise RuntimeError(message)
        return measure(model, budgets, dataclasses.replace(case, batch=1), **options)

    monkeypatch.setattr(fits, "largest_batch", lambda *_, **__: 16)
    monkeypatch.setattr(fits, "measure", timed)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(empty_cache=list))
    fit, phases = fits.tried_fit(model, result, 2**30)
    assert asked == [16, 15, 14, 13]
    assert fit.batch == 13
    assert phases.repeats == 3


def test_an_error_that_is_not_about_memory_is_no_size(monkeypatch):
    from pitome_vlm.measure.bench import fits

    model = build("tiny")
    (result,) = measure(model, [NONE], Case(1, 8, 2), repeats=1, warmup=0)
    monkeypatch.setattr(fits, "largest_batch", lambda *_, **__: 16)
    monkeypatch.setattr(fits, "measure", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fits.tried_fit(model, result, 2**30)


# --- FLOPs


@pytest.mark.parametrize(
    ("name", "algorithms"),
    [
        ("tiny", ("none", "pitome", "pitome_plus", "visionzip", "pool", "divprune")),
        ("tiny-next", ("none", "pitome_plus", "visionzip", "pool")),
    ],
)
def test_formula_and_counter_agree(name, algorithms):
    model, case = build(name), Case(image_size=(192, 192))
    for algorithm in algorithms:
        # Of pooled tiles only those at the projector have counts that the image does not change.
        stage = {"stage": "projector"} if (name, algorithm) == ("tiny-next", "pool") else {}
        config = MergeConfig(keep=0.25, algorithm=algorithm, **stage)
        budget = NONE if algorithm == "none" else Budget("x", config)
        found = counted_over_formula(model, budget, case)
        assert found == pytest.approx(1, abs=0.01), algorithm


# --- what is written


def test_json_holds_every_round_and_what_it_was_measured_on(tmp_path):
    report = Report("tiny", [measure(build("tiny"), [NONE, QUARTER], Case(1, 8, 2), repeats=3)])
    report.save(tmp_path / "new" / "b.json")
    written = json.loads((tmp_path / "new" / "b.json").read_text())
    assert set(written) == {
        *("format", "model", "setup", "depth", "formulas", "columns"),
        *("notes", "max_batch", "results"),
    }
    assert {"hardware", "threads", "torch", "transformers", "pitome_vlm"} <= set(written["setup"])
    none, quarter = written["results"]
    assert (none["visual_tokens"], quarter["visual_tokens"]) == (144, 36)
    assert quarter["config"]["keep"] == 0.25
    for row in (none, quarter):
        assert {len(values) for values in row["rounds_ms"].values()} == {3}
        for name, values in row["rounds_ms"].items():
            assert row["median_ms"][name] == pytest.approx(statistics.median(values), abs=1e-3)
    flops = quarter["flops"]
    assert flops["total"] == flops["tower"] + flops["projector"] + flops["prefill"]
    assert none["measured"]["speed_up_first"] == 1.0


def test_tables_are_text_and_the_page_holds_all_of_them():
    base, merged = phases(100.0, 10.0, depth=2.0), phases(50.0, 10.0, budget=QUARTER, depth=2.0)
    fits = {"none": Fit(8, False, 2.0), "quarter": Fit(20, True, 5.0, estimated=False)}
    report = Report("x", [[base, merged]], ["a note"], fits=fits, depth=2.0)
    times, gains, whole, largest = report.tables()
    assert times.rows[1][:3] == ("quarter", "144", "1")
    assert "1 round in turns" in times.caption
    assert (gains.rows[0][2], gains.rows[1][2]) == ("1.00x", "2.00x")
    assert "KV cache in float32" in gains.caption
    assert "full depth" in whole.caption
    assert largest.rows == [("none", "8", "computed", ">= 2"), ("quarter", "20", "tried", "5")]
    text = page(report)
    for part in ("# x", "hardware ", report.markdown(), *verdict(report), "a note"):
        assert part in text
    assert "20 prompts fit at a time instead of 8" in text


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_is_written(tmp_path, kind):
    base, merged = phases(100.0, 10.0), phases(50.0, 10.0, budget=QUARTER)
    target = tmp_path / "new" / f"b.{kind}"
    plot(Report("x", [[base, merged]], depth=2.0), target)
    assert target.stat().st_size > 5000
