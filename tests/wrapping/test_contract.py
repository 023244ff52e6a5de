"""Corners of the forward and generate contract where fewer tokens could go unnoticed."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import IMAGE, PATCHES, tiny_batch, tiny_model
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters.tower import MergingLayer
from pitome_vlm.merge.algorithm import Algorithm, MergeContext, make_plan
from pitome_vlm.merge.plan import MergePlan

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def model():
    return pitome_vlm.wrap(tiny_model(), keep=0.25)


def scores(model, **call):
    """Logits of every generated token, which say more than the tokens."""
    out = model.generate(**call, **GREEDY, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1)


def test_answers_depend_on_words_pixels_and_merging():
    """The equalities of these tests would mean little on a model that always says the same."""
    model, first, second = tiny_model(), tiny_batch(seed=1), tiny_batch(seed=2)
    others = first | {"pixel_values": second["pixel_values"]}
    plain = [model.generate(**b, **GREEDY)[:, -5:].tolist() for b in (first, second, others)]
    with pitome_vlm.wrapped(model, keep=0.25):
        plain.append(model.generate(**first, **GREEDY)[:, -5:].tolist())
    rows = [tuple(row) for answer in plain for row in answer]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("mask", ["none", "ones"])
def test_rows_that_become_ragged_answer_as_they_do_alone(model, mask):
    n = PATCHES
    words = torch.randint(3, 90, (2, 2 * n + 4), generator=torch.Generator().manual_seed(0))
    words[0, 1 : 1 + 2 * n] = IMAGE
    words[1, 2 : 2 + n] = IMAGE
    pixels = tiny_batch(images=(3,), texts=(2,))["pixel_values"]
    extra = {"attention_mask": torch.ones_like(words)} if mask == "ones" else {}
    together = scores(model, input_ids=words, pixel_values=pixels, **extra)
    for row, part in ((0, slice(0, 2)), (1, slice(2, 3))):
        alone = scores(model, input_ids=words[row : row + 1], pixel_values=pixels[part])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-3, rtol=1e-4)


def test_four_images_in_the_place_of_one_are_refused(model):
    ids = torch.tensor([[1] + [IMAGE] * PATCHES + [5]])
    pixels = torch.randn(4, 3, 96, 96)  # 4 x 36 merged tokens fill 144 placeholders
    with pytest.raises(ValueError, match=r"144 image placeholders for 4 images.*576.*144"):
        model(input_ids=ids, pixel_values=pixels)


def test_a_masked_image_keeps_its_own_pixels(model):
    batch = tiny_batch(images=(1, 1), texts=(6, 6))
    masked = batch["attention_mask"].clone()
    masked[0, : 4 + PATCHES] = 0
    logits = model(**batch | {"attention_mask": masked}).logits
    torch.testing.assert_close(logits[1], model(**batch).logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [0.5, 0.27, 1.0])
@pytest.mark.parametrize("with_pixels", [True, False])
def test_a_cache_of_other_merge_settings_is_refused(first, with_pixels):
    model = pitome_vlm.wrap(tiny_model(), keep=first)
    batch = tiny_batch(images=(1,), texts=(5,))
    out = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[11, 12]])], 1)
    pitome_vlm.wrap(model, keep=0.25)
    call = {"pixel_values": batch["pixel_values"]} if with_pixels else {}
    expected = {0.5: 72, 0.27: 39, 1.0: 144}[first]
    with pytest.raises(ValueError, match=rf"images of {expected} visual tokens.*makes 36"):
        model.generate(input_ids=ids, past_key_values=out.past_key_values, **GREEDY, **call)


def test_an_image_after_a_text_only_turn(model):
    words = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    out = model.generate(words, **GREEDY, return_dict_in_generate=True)
    image = tiny_batch(images=(1,), texts=(4,))
    ids = torch.cat([out.sequences, image["input_ids"]], 1)
    call = {"input_ids": ids, "pixel_values": image["pixel_values"]}
    if int(transformers.__version__.split(".")[0]) < 5:
        # That release itself answers wrongly here, so the wrapped model refuses.
        with pytest.raises(ValueError, match="cannot add an image to a cache"):
            scores(model, **call, past_key_values=out.past_key_values)
        return
    continued = scores(model, **call, past_key_values=out.past_key_values)
    fresh = scores(model, input_ids=ids, pixel_values=image["pixel_values"])
    torch.testing.assert_close(continued, fresh, atol=1e-3, rtol=1e-4)


def test_keep_one_with_a_cache_is_the_untouched_path():
    plain, wrapped = tiny_model(), pitome_vlm.wrap(tiny_model(), keep=1.0)
    first, second = tiny_batch(images=(1,), texts=(5,)), tiny_batch(images=(1,), texts=(4,), seed=3)
    logits = []
    for model in (plain, wrapped):
        cache = model(**first, use_cache=True).past_key_values
        both = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1])
        out = model(**second | {"attention_mask": both.long()}, past_key_values=cache)
        logits.append(out.logits)
    assert torch.equal(*logits)


def test_forward_adds_an_image_to_a_cache_with_a_mask_over_both(model):
    first, second = tiny_batch(images=(1,), texts=(5,)), tiny_batch(images=(1,), texts=(4,), seed=3)
    cache = model(**first, use_cache=True).past_key_values
    cached, new = cache.get_seq_length(), second["input_ids"].shape[1]
    whole = torch.ones(1, cached + new, dtype=torch.long)
    continued = model(**second | {"attention_mask": whole}, past_key_values=cache).logits
    together = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    fresh = model(**together).logits[:, cached:]
    torch.testing.assert_close(continued, fresh, atol=1e-3, rtol=1e-4)
    short = torch.ones(1, new - 2, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"must cover the {new} tokens.*got {new - 2}"):
        model(**second | {"attention_mask": short})


def test_positions_of_the_caller_reach_generate():
    batch = tiny_batch(images=(1,), texts=(5,))
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    stretched = positions.clone()
    stretched[:, 2:] += 40
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    usual = scores(model, **batch)[:, 0]
    torch.testing.assert_close(
        scores(model, **batch, position_ids=positions)[:, 0], usual, atol=1e-4, rtol=1e-4
    )
    assert (scores(model, **batch, position_ids=stretched)[:, 0] - usual).abs().max() > 1e-2


def test_max_length_with_embeddings_and_below_the_prompt(model):
    batch = tiny_batch(images=(1,), texts=(5,))
    width = batch["input_ids"].shape[1]
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {"pixel_values": batch["pixel_values"], "do_sample": False}
    out = model.generate(inputs_embeds=embeds, max_length=width + 4, **rest)
    assert out.shape == (1, 4)
    with pytest.raises(ValueError, match=rf"max_length is 50, but the prompt alone has {width}"):
        model.generate(**batch, max_length=50)


def test_criteria_and_processors_of_the_caller_see_its_prompt(model):
    batch = tiny_batch(images=(1, 1))
    prompt, seen = batch["input_ids"], {"criterion": [], "processor": []}

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen["criterion"].append(input_ids)
            return torch.full((len(input_ids),), input_ids.shape[1] >= prompt.shape[1] + 3)

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen["processor"].append(input_ids)
            return scores

    out = model.generate(
        **batch,
        **GREEDY,
        stopping_criteria=StoppingCriteriaList([Criterion()]),
        logits_processor=LogitsProcessorList([Processor()]),
    )
    assert out.shape[1] == prompt.shape[1] + 3
    assert [ids.shape[1] - prompt.shape[1] for ids in seen["criterion"]] == [1, 2, 3]
    assert [ids.shape[1] - prompt.shape[1] for ids in seen["processor"]] == [0, 1, 2]
    for ids in seen["criterion"] + seen["processor"]:
        assert torch.equal(ids[:, : prompt.shape[1]], prompt)


def test_positional_arguments_and_what_cannot_be_combined(model):
    batch = tiny_batch(images=(1,), texts=(5,))
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(batch["input_ids"], None, None, **rest, **GREEDY), expected)
    with pytest.raises(ValueError, match="prefill_chunk_size=16 cannot be combined"):
        model.generate(**batch, **GREEDY, prefill_chunk_size=16)


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(3, 96, 96), torch.zeros(1, 1, 3, 96, 96), torch.zeros(0, 3, 96, 96), [1, 2]],
    ids=["3-D", "5-D", "no image", "list"],
)
def test_pixels_of_another_form_are_named(model, pixels):
    batch = tiny_batch(images=(1,), texts=(5,)) | {"pixel_values": pixels}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"pixel_values must be a tensor \[images, 3"):
            call(**batch)


def test_scores_are_float32_under_autocast():
    dtypes = []

    def probe(keys, n_out, *, ctx):
        dtypes.append((keys @ keys.transpose(-1, -2)).dtype)
        return MergePlan.from_assignment(torch.arange(6)[None].clamp(max=n_out - 1), n_out)

    algorithm = Algorithm(name="probe", plan=probe, source="this test", pairwise=False)
    keys, context = torch.randn(1, 6, 4), MergeContext(MergeConfig(keep=0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        make_plan(algorithm, keys, 3, ctx=context)
        outside = (keys @ keys.transpose(-1, -2)).dtype
    make_plan(algorithm, keys, 3, ctx=context)
    assert outside == torch.bfloat16
    assert dtypes == [torch.float32, torch.float32]


def test_a_model_under_autocast_merges_as_scheduled(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**tiny_batch(images=(1,), texts=(5,))).logits
    assert logits.isfinite().all()


def test_encodings_of_other_threads_do_not_leak(model):
    from concurrent.futures import ThreadPoolExecutor

    batch = tiny_batch(images=(1,), texts=(4,))
    tower, lengths = model.model.vision_tower, []
    layer = next(module for module in tower.modules() if isinstance(module, MergingLayer))

    def look_from_outside(*_):
        with ThreadPoolExecutor(1) as pool:
            alone = pool.submit(lambda: tower(batch["pixel_values"]).last_hidden_state.shape[1])
            lengths.append(alone.result())

    hook = layer.mlp.register_forward_hook(lambda *_: hook.remove() or look_from_outside())
    assert pitome_vlm.encode_images(model, batch["pixel_values"]).counts == [36]
    assert lengths == [1 + PATCHES]


def test_a_replaced_tower_asks_for_a_new_wrap(model):
    model.model.vision_tower = tiny_model(seed=5).model.vision_tower
    with pytest.raises(RuntimeError, match=r"replaced after wrap\(\); call pitome_vlm.wrap"):
        model(**tiny_batch())
    pitome_vlm.wrap(model, keep=0.25)
    assert pitome_vlm.encode_images(model, tiny_batch()["pixel_values"]).counts == [36] * 3


def test_a_module_that_hides_merging_is_noticed(model):
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(lambda _, __, out: out[:, :-1])
    with pytest.raises(RuntimeError, match="gave 35 visual tokens per image where 36"):
        model(**tiny_batch())


def test_compiled_models_and_checkpoint_wrappers_are_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny_model()
    with pytest.raises(TypeError, match=r"wrap\(\) the model first and compile it then"):
        pitome_vlm.wrap(torch.compile(model), keep=0.5)
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList) and hasattr(module[0], "layer_norm1"):
            module[0] = checkpoint_wrapper(module[0])
    with pytest.raises(RuntimeError, match=r"CheckpointWrapper.*gradient_checkpointing_enable"):
        pitome_vlm.wrap(model, keep=0.5)


@pytest.mark.slow
def test_the_compiled_tower_merges_without_graph_breaks(model):
    batch = tiny_batch()
    eager = model(**batch).logits
    explained = []

    def backend(graph, _):
        explained.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.model.vision_tower.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(**batch).logits, eager, atol=1e-4, rtol=1e-4)
    assert explained


def test_printing_never_fails(model):
    model.config.vision_feature_layer = 77
    assert "not applicable: vision_feature_layer must be in" in repr(model)


def test_a_cache_filled_in_place_is_marked_too(model):
    batch, cache = tiny_batch(images=(1,), texts=(5,)), DynamicCache()
    out = model.generate(**batch, **GREEDY, past_key_values=cache)
    pitome_vlm.wrap(model, keep=0.5)
    with pytest.raises(ValueError, match="images of 36 visual tokens"):
        model.generate(torch.cat([out, out[:, -1:]], 1), past_key_values=cache, **GREEDY)
