from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from checkpoint import save_checkpoint, tiny_config
from peft import LoraConfig, get_peft_model
from tiny import IMAGE, KINDS, tiny_batch, tiny_model, tokens_per_image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
)

from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.description import describe, from_config
from pitome_vlm.measure.timing import Timing, time_prefill
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.wrapping.encode import planned_schedule
from pitome_vlm.wrapping.wrap import is_wrapped, schedule_of, unwrap, wrap, wrapped

OPTIONS = {
    "none": None,
    "keep 1": {"keep": 1.0},
    "tower .5": {"keep": 0.5, "stage": "tower"},
    "tower .25": {"keep": 0.25, "stage": "tower"},
    "projector .5": {"keep": 0.5, "stage": "projector"},
    "projector .25": {"keep": 0.25, "stage": "projector"},
    "both .5": {"keep": 0.5, "stage": "both"},
    "both .25": {"keep": 0.25, "stage": "both"},
    "ratio": {"ratio": 0.9},
    "steep ratio": {"ratio": 0.3, "layers": (2,)},
    "one layer": {"keep": 0.2, "layers": (3,)},
    "hidden, after the layer": {"keep": 0.3, "metric": "hidden", "placement": "after_layer"},
    "tome": {"keep": 0.5, "algorithm": "tome"},
    "pitome": {"keep": 0.5, "algorithm": "pitome", "stage": "projector"},
    "pitome, few merges": {"ratio": 0.9, "algorithm": "pitome", "metric": "hidden"},
    "matching early": {"keep": 0.5, "algorithm": "pitome", "early_matching": 0.5},
    "random": {"keep": 0.25, "algorithm": "random"},
    **{
        name: {"keep": 0.3, "algorithm": name}
        for name in ("tofu", "diffrate", "visionzip", "vispruner", "scope", "holov", "divprune")
    },
}


def counted(model, batch):
    """FLOPs of tower, projector (with merging before it) and language model, as torch counts."""
    counter = FlopCounterMode(display=False, depth=10)
    # The CPU's fused attention kernel is unknown to the counter; the plain one is not.
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch, logits_to_keep=1)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def of(part):
        return max((n for name, n in flops.items() if name.endswith(part)), default=0)

    tower, language = of(".vision_tower"), of(".language_model") + of(".lm_head")
    return tower, flops["Global"] - tower - language, language


def text_tokens(batch):
    return int((batch["input_ids"] != IMAGE).sum())


def shares(model, batch, **options):
    """Computed over counted for tower, projector and language model."""
    cost = costs(model, text_tokens=text_tokens(batch), **options)
    computed = (cost.tower_flops, cost.projector_flops, cost.prefill_flops)
    return [a / b for a, b in zip(computed, counted(model, batch), strict=True)]


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_model(kind) for kind in KINDS}


@pytest.fixture
def model(models):
    """The shared CLIP model, unwrapped again after every test."""
    yield models["clip"]
    unwrap(models["clip"])


class TestFlops:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_agree_with_torch(self, model, options):
        if options is not None:
            wrap(model, **options)
        assert shares(model, tiny_batch("clip", (1,), (5,))) == pytest.approx([1, 1, 1], rel=0.01)

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "clip"])
    def test_agree_with_torch_for_every_tower(self, models, kind):
        for name in ("none", "both .25", "visionzip"):
            with wrapped(models[kind], **(OPTIONS[name] or {"keep": 1.0})):
                found = shares(models[kind], tiny_batch(kind, (1,), (5,)))
            assert found == pytest.approx([1, 1, 1], rel=0.01), name

    def test_average_pooling_compares_nothing(self, model):
        wrap(model, keep=0.25, algorithm="pool")
        batch = tiny_batch("clip", (1,), (5,))
        assert shares(model, batch) == pytest.approx([1, 1, 1], rel=0.01)
        assert costs(model).merge_flops == 0

    def test_eager_attention(self):
        model = wrap(tiny_model("clip", attention="eager"), keep=0.5)
        batch = tiny_batch("clip", (1,), (5,))
        assert shares(model, batch) == pytest.approx([1, 1, 1], rel=0.01)

    def test_several_images(self, model):
        wrap(model, keep=0.25)
        batch = tiny_batch("clip", (3,), (5,))
        assert shares(model, batch, images=3) == pytest.approx([1, 1, 1], rel=0.01)

    def test_lora(self):
        target = r".*(language_model|vision_tower).*\.(q_proj|k_proj|fc1)"
        model = get_peft_model(tiny_model(), LoraConfig(r=8, target_modules=target))
        plain, batch = costs(tiny_model()), tiny_batch("clip", (1,), (5,))
        wrap(model, keep=0.5)
        assert shares(model, batch) == pytest.approx([1, 1, 1], rel=0.01)
        assert costs(model, planned_schedule(model, MergeConfig(keep=1.0))).tower_flops > (
            plain.tower_flops
        )

    def test_tower_of_unknown_layers(self):
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        vision = ViTConfig(**size, num_hidden_layers=4, image_size=96, patch_size=8)
        text = LlamaConfig(**size, num_hidden_layers=2, vocab_size=128)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        tower = LlavaForConditionalGeneration(config).eval().model.vision_tower
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            tower(torch.zeros(1, 3, 96, 96), output_hidden_states=True)
        model = LlavaForConditionalGeneration(config)
        # The pooler is taken for a part of every token.
        assert costs(model).tower_flops == pytest.approx(counter.get_total_flops(), rel=0.06)

    def test_parts_add_up(self, model):
        cost = costs(wrap(model, keep=0.25, stage="both"), images=2)
        assert cost.total_flops == cost.tower_flops + cost.projector_flops + cost.prefill_flops
        assert sum(cost.layer_flops) < cost.tower_flops
        assert len(cost.layer_flops) == 5  # of 6: nothing reads the last one
        assert 0 < cost.merge_flops < cost.tower_flops
        assert cost.prompt_tokens == 64 + 2 * 36

    def test_formulas_by_hand(self):
        # LLaVA-1.5-7B, the numbers of its config.
        vision = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        text = LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        )
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(
                LlavaConfig(vision_config=vision, text_config=text)
            )
        cost = costs(model, text_tokens=24, dtype=torch.float16)
        n = 600
        per_layer = n * (8 * 4096**2 + 6 * 4096 * 11008) + 4 * n**2 * 4096
        assert cost.prefill_flops == 32 * per_layer + 2 * 4096 * 32064
        assert cost.kv_bytes == n * 512 * 1024
        layer = 577 * (8 * 1024**2 + 4 * 1024 * 4096) + 4 * 577**2 * 1024
        assert cost.tower_flops == 24 * layer + 576 * 2 * 3 * 14**2 * 1024
        assert cost.projector_flops == 576 * 2 * (1024 * 4096 + 4096**2)


class TestCosts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [None, {"keep": 0.25}])
    def test_cache_is_as_large_as_said(self, dtype, options):
        model, batch = tiny_model().to(dtype), tiny_batch("clip", (1,), (5,))
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        if options is not None:
            wrap(model, **options)
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**batch, past_key_values=cache, use_cache=True)
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        cost = costs(model, text_tokens=text_tokens(batch))
        assert cost.kv_bytes == held
        assert cost.kv_bytes_per_image == held * cost.visual_tokens // cost.prompt_tokens
        assert cost.kv_dtype == str(dtype).removeprefix("torch.")

    def test_dtype_of_the_cache(self, model):
        assert costs(model, dtype=torch.float16).kv_dtype == "float16"
        assert costs(model).kv_bytes == 2 * costs(model, dtype=torch.float16).kv_bytes

    def test_visual_tokens(self, models):
        for kind, model in models.items():
            assert costs(model).visual_tokens == tokens_per_image(kind), kind
            with wrapped(model, tokens=40):
                assert costs(model).visual_tokens == 40, kind

    def test_nothing_changes(self, model):
        classes = [type(module) for module in model.modules()]
        costs(model, planned_schedule(model, MergeConfig(keep=0.5)))
        describe(model)
        assert [type(module) for module in model.modules()] == classes

    @pytest.mark.parametrize("field", ["text_tokens", "images"])
    def test_bad_counts(self, model, field):
        with pytest.raises(ValueError, match=f"{field} must be at least 0, got -1"):
            costs(model, **{field: -1})
        for value in (1.5, True):
            with pytest.raises(TypeError, match=f"{field} must be a whole number, got {value}"):
                costs(model, **{field: value})

    def test_unsupported_model(self):
        with pytest.raises(TypeError, match="cannot wrap Linear"):
            costs(torch.nn.Linear(2, 2))


class TestDescribe:
    def test_wrapped(self, model):
        wrap(model, keep=0.25, stage="both", tower_share=0.5)
        told = describe(model, text_tokens=10)
        assert told.wrapped
        assert told.schedule == schedule_of(model)
        assert (told.tokens_in, told.tokens_out) == (144, 36)
        layers, before, after = zip(*told.tower_steps, strict=True)
        assert layers == (1, 3)
        assert before == (144, *after[:-1])
        assert after[-1] == told.projector_steps[0][0] == 72
        assert told.projector_steps[-1][1] == 36
        assert told.before.prompt_tokens == 154
        assert told.after == costs(model, text_tokens=10)
        with wrapped(model, keep=1.0):
            assert told.before == costs(model, text_tokens=10)

    def test_layers_that_merge_where_none_are_named(self, model):
        every = (0, 1, 2, 3, 4)
        for options, expected in (
            ({"keep": 0.25}, (1, 3)),
            ({"keep": 0.25, "layers": every}, every),
            ({"keep": 0.25, "stage": "tower"}, every),
            ({"keep": 0.25, "algorithm": "tome"}, every),
            ({"keep": 0.25, "algorithm": "pitome"}, every),
            ({"ratio": 0.9}, every),
        ):
            told = describe(model, config=MergeConfig.from_dict(options))
            assert tuple(layer for layer, *_ in told.tower_steps) == expected, options

    def test_saved_is_in_percent(self, model):
        told = describe(wrap(model, keep=0.25))
        assert told.saved("visual_tokens") == 75
        assert told.saved("kv_bytes_per_image") == 75
        whole, part = told.before.prefill_flops, told.after.prefill_flops
        assert told.saved("prefill_flops") == pytest.approx(100 * (whole - part) / whole)
        assert describe(wrap(model, keep=1.0)).saved("total_flops") == 0

    def test_table(self, model):
        told = describe(wrap(model, keep=0.25, algorithm="pitome", margin=0.3))
        text = str(told)
        assert repr(told) == text
        lines = text.splitlines()
        assert lines[0] == "pitome keep=0.25 margin=0.3: 144 -> 36 visual tokens per image"
        assert "not switched on" not in text
        assert "4: 48 -> 36" in text
        assert max(map(len, lines)) <= 79
        row = next(line.split() for line in lines if line.startswith("visual tokens"))
        assert row[-4:] == ["144", "36", "75.0", "%"]
        for part in ("vision tower", "prefill", "KV cache", "without", "64 text tokens"):
            assert part in text
        # Numbers are aligned to the right, and the cache says how wide they are.
        first = lines.index(next(line for line in lines if line.endswith("saved")))
        table = lines[first : lines.index("", first)]
        assert len({len(line) for line in table}) == 1
        assert "KV cache per image (float32)" in text

    def test_notebooks_show_a_table(self, model):
        told = describe(model, config=MergeConfig(keep=0.25))
        page = told._repr_html_()
        assert page.count("<tr>") == 9
        assert "144 -&gt; 36 visual tokens per image" in page
        assert 'text-align: right">75.0 %</td>' in page
        assert "KV cache of the prompt (float32)" in page

    def test_unwrapped_says_so_and_what_would_be(self, model):
        told = describe(model)
        assert not told.wrapped
        assert str(told).startswith("not switched on; with pitome_vlm.wrap(model, ...)")
        assert told.after == costs(wrap(model, keep=0.25))
        assert not describe(unwrap(model), config=MergeConfig(tokens=9)).wrapped

    def test_other_options_than_those_in_force(self, model):
        wrap(model, keep=0.25)
        told = describe(model, config=MergeConfig(tokens=50))
        assert not told.wrapped
        assert told.tokens_out == 50
        assert schedule_of(model).tokens_out == 36
        assert describe(model, config=MergeConfig(keep=0.25)).wrapped

    def test_identity(self, model):
        text = str(describe(wrap(model, keep=1.0)))
        assert "nothing is merged" in text
        assert "by tower layer" not in text

    def test_json(self, model):
        told = describe(wrap(model, keep=0.25))
        values = json.loads(json.dumps(told.to_dict()))
        assert values["tokens_out"] == 36
        assert MergeConfig.from_dict(values["config"]) == told.config
        assert values["costs"]["kv_bytes"]["with"] == told.after.kv_bytes

    def test_inside_peft(self):
        model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
        assert describe(wrap(model, keep=0.25)).wrapped


class TestFromConfig:
    def test_equals_the_model(self):
        config = tiny_config()
        merging = MergeConfig(keep=0.25, stage="both")
        expected = describe(LlavaForConditionalGeneration(config), config=merging, text_tokens=9)
        assert from_config(config, merging, text_tokens=9) == expected

    def test_from_a_folder_without_weights(self, tmp_path):
        save_checkpoint(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        told = from_config(str(tmp_path))
        assert (told.tokens_in, told.tokens_out, told.wrapped) == (144, 36, False)

    def test_config_is_left_alone(self):
        config = tiny_config()
        before = copy.deepcopy(config.to_dict())
        from_config(config)
        assert config.to_dict() == before

    def test_dtype_of_the_config(self):
        full, half = tiny_config(torch.float32), tiny_config(torch.float16)
        assert from_config(full).after.kv_bytes == 2 * from_config(half).after.kv_bytes

    def test_7b_takes_seconds(self):
        text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        start = time.perf_counter()
        told = from_config(LlavaConfig(text_config=text))
        assert told.before.prefill_flops > 5e12
        assert time.perf_counter() - start < 60

    def test_other_model(self):
        with pytest.raises(TypeError, match=r"LlamaConfig has model_type 'llama'.*docs/models.md"):
            from_config(LlamaConfig())


class TestTimePrefill:
    def test_real_model(self, model):
        wrap(model, keep=0.25)
        batch = tiny_batch("clip", (1,), (5,))
        timing = time_prefill(model, batch, repeats=3, warmup=1)
        assert timing.repeats == 3
        assert 0 < timing.median_ms < 60_000
        assert timing.iqr_ms >= 0
        assert is_wrapped(model)

    def test_what_is_timed(self):
        calls = []

        class Model:
            def generate(self, **arguments):
                calls.append(arguments)
                # Warm-up is slow, then 20 ms: only the latter may count.
                time.sleep(0.2 if len(calls) <= 2 else 0.02)

        timing = time_prefill(Model(), {"input_ids": torch.zeros(1)}, repeats=5, warmup=2)
        assert len(calls) == 7
        assert all(c["max_new_tokens"] == c["min_new_tokens"] == 1 for c in calls)
        assert 20 <= timing.median_ms < 150

    def test_one_run_has_no_spread(self, model):
        timing = time_prefill(model, tiny_batch("clip", (1,), (5,)), repeats=1, warmup=0)
        assert (timing.iqr_ms, timing.repeats) == (0, 1)

    def test_shown(self):
        assert str(Timing(12.345, 0.5, 20)) == "12.3 ms (IQR 0.5, 20 runs)"

    def test_bad_arguments(self, model):
        batch = tiny_batch()
        for wrong, error, message in (
            ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
            ({"repeats": 1.5}, TypeError, "repeats must be a whole number, got 1.5"),
            ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ):
            with pytest.raises(error, match=message):
                time_prefill(model, batch, **wrong)
        with pytest.raises(ValueError, match="tensors"):
            time_prefill(model, {"input_ids": [1, 2]})
