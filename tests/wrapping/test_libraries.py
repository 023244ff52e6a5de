"""What people do to models with transformers, PEFT, accelerate and PyTorch: to wrapped ones."""

from __future__ import annotations

import contextlib
import copy
import io
import threading

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, disk_offload
from families import IMAGE_FAMILIES, llava, qwen2_5_vl
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from PIL import Image
from test_same_contract import one_row
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DynamicCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StaticCache,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import pitome_vlm
from pitome_vlm.measure.asking import question_prompt
from pitome_vlm.releases import CACHE_NAME, EMBEDS_NEED_EMPTY_CACHE
from pitome_vlm.wrapping.wrap import is_wrapped

GREEDY = {"max_new_tokens": 4, "do_sample": False}
LORA = LoraConfig(target_modules=r".*language_model.*q_proj", r=2, init_lora_weights=False)
REPORT = {"report_to": [], "use_cpu": True, "disable_tqdm": True}


def wrapped(family=llava):
    model, batch = family()
    return pitome_vlm.wrap(model, keep=0.25), batch


@contextlib.contextmanager
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(model):
    for module in model.modules():
        if type(module).__name__ in ("LlamaDecoderLayer", "CLIPEncoderLayer"):
            fully_shard(module)
    return fully_shard(model)


@pytest.mark.slow
@pytest.mark.parametrize("shard_first", [False, True])
def test_fsdp2_before_or_after(shard_first):
    plain, batch = llava()
    expected = plain(**batch).logits
    merged = pitome_vlm.wrap(plain, keep=0.25)
    logits, answer = merged(**batch).logits, merged.generate(**batch, **GREEDY)
    model, _ = llava()
    with one_process():
        if shard_first:
            pitome_vlm.wrap(sharded(model), keep=0.25)
        else:
            sharded(pitome_vlm.wrap(model, keep=0.25))
        assert is_wrapped(model)
        torch.testing.assert_close(model(**batch).logits, logits)
        assert torch.equal(model.generate(**batch, **GREEDY, synced_gpus=True), answer)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        pitome_vlm.unwrap(model)
        assert type(model).__name__.startswith("FSDP")
        torch.testing.assert_close(model(**batch).logits, expected)


def test_ddp_and_data_parallel():
    model, batch = wrapped()
    logits = model(**batch).logits
    assert torch.equal(nn.DataParallel(model)(**batch).logits, logits)
    with one_process():
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        loss = parallel(**batch, labels=batch["input_ids"]).loss
        loss.backward()
    assert torch.equal(loss, model(**batch, labels=batch["input_ids"]).loss)
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_offload_to_disk_and_accelerator(tmp_path):
    model, batch = wrapped()
    logits = model(**batch).logits
    assert Accelerator(cpu=True).unwrap_model(Accelerator(cpu=True).prepare(model)) is model
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(model(**batch).logits, logits)
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 4


def test_the_type_may_change_and_tables_may_grow_after_wrapping():
    first, batch = llava()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    expected = pitome_vlm.wrap(first.bfloat16(), keep=0.25).generate(**batch, **GREEDY)
    model = wrapped()[0].to(torch.bfloat16)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    model.resize_token_embeddings(140, mean_resizing=False)
    model.tie_weights()
    new = {"suppress_tokens": list(range(128, 140))}
    assert torch.equal(model.generate(**batch, **GREEDY, **new), expected)


def test_copies_pickles_and_state_dicts():
    for family in (llava, qwen2_5_vl):
        model, batch = wrapped(family)
        file = io.BytesIO()
        torch.save(model, file)  # before generate: transformers 5 leaves hooks that do not pickle
        file.seek(0)
        plain, _ = family()
        assert list(plain.state_dict()) == list(model.state_dict())
        model.load_state_dict(plain.state_dict())
        expected = model.generate(**batch, **GREEDY)
        for one in (torch.load(file, weights_only=False), copy.deepcopy(model)):
            assert torch.equal(one.generate(**batch, **GREEDY), expected)
            assert not is_wrapped(pitome_vlm.unwrap(one))
            assert is_wrapped(model)


def test_several_adapters_switched_mixed_and_unloaded():
    model, batch = wrapped()
    plain = model.generate(**batch, **GREEDY)
    adapted = get_peft_model(model, LORA)
    adapted.add_adapter("second", LORA)
    first = adapted(**batch).logits
    adapted.set_adapter("second")
    assert not torch.equal(adapted(**batch).logits, first)
    adapted.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mix")
    adapted.set_adapter("default")
    assert torch.equal(adapted(**batch).logits, first)
    adapted.delete_adapter("mix")
    unloaded = adapted.unload()
    assert is_wrapped(unloaded)
    assert torch.equal(unloaded.generate(**batch, **GREEDY), plain)


@pytest.mark.parametrize("kind", [IA3Config, VeraConfig])
def test_other_adapters_than_lora(kind):
    model, batch = wrapped()
    targets = {"target_modules": r".*language_model.*v_proj", "task_type": "CAUSAL_LM"}
    more = {"feedforward_modules": []} if kind is IA3Config else {}
    adapted = get_peft_model(model, kind(**targets, **more))
    assert adapted.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 4
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.requires_grad for p in adapted.parameters())


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_are_trained_but_not_generated_with(kind):
    sizes = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
    if kind is PrefixTuningConfig:
        sizes |= {"token_dim": 16, "num_attention_heads": 2}
    config = kind(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_transformer_submodules=1, **sizes
    )
    model, batch = llava()
    adapted = get_peft_model(model, config)
    expected = adapted.generate(**batch, **GREEDY)
    pitome_vlm.wrap(adapted, keep=1.0)
    assert torch.equal(adapted.generate(**batch, **GREEDY), expected)
    pitome_vlm.wrap(adapted, keep=0.25)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.requires_grad for p in adapted.parameters())
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be combined with merged images"):
        adapted.generate(**batch, **GREEDY)


@pytest.mark.slow
def test_two_threads_generate_on_one_model():
    # transformers 4.57 records states by exchanging methods: there only models without (LLaVA).
    for family in (llava,) if EMBEDS_NEED_EMPTY_CACHE else IMAGE_FAMILIES:
        model, batch = wrapped(family)
        rows = [one_row(batch, row) for row in (0, 1)]
        expected, found = [model.generate(**row, **GREEDY) for row in rows], {}

        def run(number, model=model, rows=rows, found=found):
            found[number] = model.generate(**rows[number % 2], **GREEDY)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[number], expected[number % 2]) for number in range(6))


def test_inference_mode_then_training():
    model, batch = wrapped()
    cache = pitome_vlm.ImageCache()
    expected = model.generate(**batch, **GREEDY)
    with torch.inference_mode(), torch.inference_mode():
        assert torch.equal(model.generate(**batch, **GREEDY, image_cache=cache), expected)
    model(**batch, labels=batch["input_ids"], image_cache=cache).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_checkpointing_of_either_kind_changes_no_gradient():
    for family in IMAGE_FAMILIES:
        model, batch = wrapped(family)
        call = batch | {"labels": batch["input_ids"], "use_cache": False}
        model.train()(**call).loss.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for reentrant in (False, True):
            model.zero_grad()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model(**call).loss.backward()
            model.gradient_checkpointing_disable()
            for name, parameter in model.named_parameters():
                if name in expected:
                    torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.slow
def test_caches_that_a_caller_brings():
    for family in IMAGE_FAMILIES:
        model, batch = wrapped(family)
        text, width = model.config.get_text_config(), batch["input_ids"].shape[1]
        beams = model.generate(**batch, **GREEDY, num_beams=2)
        given = {CACHE_NAME: DynamicCache(config=text)}
        assert torch.equal(model.generate(**batch, **GREEDY, num_beams=2, **given), beams)
        expected = model.generate(**batch, **GREEDY)
        static = StaticCache(config=text, max_cache_len=width + 8)
        options = GREEDY | {"disable_compile": True, CACHE_NAME: static}
        for _ in range(2):
            assert torch.equal(model.generate(**batch, **options), expected)
            static.reset()


def rows_of(count):
    row = {name: value[0] for name, value in tiny_batch(images=(1,), texts=(6,)).items()}
    return [row | {"labels": row["input_ids"]}] * count


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_predictions_of_trainers(tmp_path):
    model, _ = llava()
    pitome_vlm.wrap(model, keep=0.25)
    width = rows_of(1)[0]["input_ids"].shape[0]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, **REPORT)
    trainer = Trainer(model=model, args=arguments, data_collator=collate)
    # Transformers 5.18 gathers the cache of LLaVA too, if it is not named, and fails.
    found = trainer.predict(rows_of(2), ignore_keys=[CACHE_NAME])
    # Logits of the shortened prompt, labels of the caller's: `training.MergingTrainer` aligns them.
    assert found.predictions[0].shape[1] == width - 108
    assert found.label_ids.shape[1] == width
    options = {"predict_with_generate": True, "generation_max_length": width + 4}
    arguments = Seq2SeqTrainingArguments(str(tmp_path), **options, **REPORT)
    trainer = Seq2SeqTrainer(model=model, args=arguments, data_collator=collate)
    assert trainer.predict(rows_of(2)).predictions.shape == (2, width + 4)


@pytest.fixture(scope="module")
def demo():
    model, processor = pitome_vlm.load("demo", keep=0.25)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (96, 96, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    return model, processor, image, question_prompt(processor, "what color is the circle")


def test_a_pipeline_takes_a_wrapped_model(demo):
    model, processor, image, text = demo
    run = pipeline("image-text-to-text", model=model, processor=processor)
    inputs = processor(images=image, text=text, return_tensors="pt")
    told = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(told, skip_special_tokens=True).strip()
    (found,) = run(images=image, text=text, max_new_tokens=4)
    assert found["generated_text"].endswith(expected)
    assert len(run(images=[image] * 2, text=[text] * 2, max_new_tokens=4, batch_size=2)) == 2


def test_text_streamers(demo):
    model, processor, image, text = demo
    inputs = processor(images=image, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    call = {**inputs, "max_new_tokens": 4, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=call)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == processor.tokenizer.decode(out)


def test_embeddings_leave_an_assistant_nothing_to_read():
    model, batch = wrapped()
    alone = one_row(batch, 1)
    embedded = {n: value for n, value in alone.items() if n != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(alone["input_ids"]).detach()
    for call in (pitome_vlm.compact_inputs(model, **alone), embedded):
        with pytest.raises(ValueError, match="assistant_model needs input_ids"):
            model.generate(**call, **GREEDY, assistant_model=tiny_model())
        assert model.generate(**call, **GREEDY, num_beams=2).shape == (1, 4)
