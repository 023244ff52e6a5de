"""Training with merging on: losses fall, gradients arrive, the Trainer's extras work."""

from __future__ import annotations

import copy
import json

import bitsandbytes
import numpy as np
import pytest
import torch
from checkpoint import edit_weights, save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IMAGE, KINDS, tiny_batch, tiny_model
from training_data import louder, record, records, write_lines
from transformers import Trainer, TrainingArguments

import pitome_vlm
from pitome_vlm.loading.quantization import allow_gradients
from pitome_vlm.releases import CACHE_NAME
from pitome_vlm.training import (
    PARTS,
    Collator,
    LoraOptions,
    MergingTrainer,
    ShorteningCollator,
    answer_metrics,
    open_conversations,
    prepare,
    shorten,
    target_modules,
    train,
)
from pitome_vlm.training.arguments import training_arguments
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config, schedule_of

BITS = {"lora": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("llava"))
    edit_weights(folder, louder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_lines(folder / "train.jsonl", records(folder, 12))


def loaded(checkpoint, bits="lora", **options):
    options = {"tokens": 16, "dtype": "float32"} | BITS[bits] | options
    return pitome_vlm.load(checkpoint, **options)


def batch_of(processor, data, count=4):
    conversations = open_conversations(data)
    return Collator(processor)([conversations[index] for index in range(count)])


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# --- gradients and losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_loss_falls_and_every_gradient_arrives_also_after_an_evaluation(
    checkpoint, data, bits, checkpointing
):
    model, processor = loaded(checkpoint, bits)
    batch = batch_of(processor, data)
    with torch.no_grad():
        model(**batch)  # before training, too
    model = prepare(model, LoraOptions(rank=4, parts=PARTS)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(5):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        if step:  # at the first step one half of every adapter is zero
            found = gradients(model)
            assert all(g is not None and g.abs().max() > 0 for g in found.values())
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            model.eval()(**batch)
            model.train()
    assert losses[-1] < 0.8 * losses[0]


def packed(model) -> int:
    """Layers whose weights bitsandbytes has repacked for a CPU kernel without gradients."""
    states = [
        module.weight.quant_state
        for module in model.modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    ]
    return sum(getattr(state, "packing_format_for_cpu", False) for state in states)


def claim_avx512(model):
    """What bitsandbytes finds on a CPU with AVX512-BF16; the repacking itself runs anywhere."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True


def kernel_of_such_a_cpu(inputs, weight, out=None, state=None):
    """The product with a repacked weight as that CPU's kernel gives it: without a gradient."""
    unpack = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse
    plain, plain_state = unpack(weight.clone(), copy.copy(state))
    matrix = bitsandbytes.functional.dequantize_4bit(plain, plain_state)
    return (inputs @ matrix.t().to(inputs.dtype)).detach()


class TestRepackedWeights:
    @pytest.fixture(autouse=True)
    def such_a_cpu(self, monkeypatch):
        monkeypatch.setattr(bitsandbytes.functional, "gemv_4bit", kernel_of_such_a_cpu)

    def test_the_trap_is_there(self, checkpoint, data):
        # Without our help: an evaluation, and then layers before others get no gradient.
        model, processor = loaded(checkpoint, "nf4")
        claim_avx512(model)
        batch = batch_of(processor, data)
        config = LoraConfig(target_modules=target_modules(model), r=4)
        with torch.no_grad():
            model(**batch)
        assert packed(model) == 14
        model = get_peft_model(model, config).train()
        model(**batch).loss.backward()
        later = {n: g for n, g in gradients(model).items() if "lora_B" in n and "v_proj" in n}
        assert len(later) == 2
        assert all(grad is None or not grad.any() for grad in later.values())

    def test_evaluation_before_training(self, checkpoint, data):
        model, processor = loaded(checkpoint, "nf4")
        claim_avx512(model)
        batch = batch_of(processor, data)
        weights = [
            bitsandbytes.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
            for m in model.modules()
            if isinstance(m, bitsandbytes.nn.Linear4bit)
        ]
        with torch.no_grad():
            model(**batch)
        with pytest.warns(UserWarning, match="14 4-bit layers had been repacked"):
            model = prepare(model, LoraOptions(rank=4))
        assert packed(model) == 0
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                again = bitsandbytes.functional.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                )
                torch.testing.assert_close(again, weights.pop(0), rtol=0.05, atol=2e-3)
        self.trains(model, batch)

    def test_evaluation_between_steps(self, checkpoint, data):
        model, processor = loaded(checkpoint, "nf4")
        claim_avx512(model)
        model = prepare(model, LoraOptions(rank=4))
        batch = batch_of(processor, data)
        with torch.no_grad():
            model.eval()(**batch)
        assert packed(model) == 0
        self.trains(model, batch)

    def trains(self, model, batch):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            optimizer.step()
        assert all(g is not None and g.any() for g in gradients(model).values())

    def test_nothing_to_do(self, checkpoint):
        for bits in BITS:
            assert allow_gradients(loaded(checkpoint, bits)[0]) == 0


# --- where adapters go


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [PARTS[:1], PARTS[1:2], PARTS[2:], PARTS])
def test_adapters_go_where_they_were_asked_for(kind, parts):
    model = prepare(pitome_vlm.wrap(tiny_model(kind), tokens=30), LoraOptions(rank=2, parts=parts))
    names = {
        "language_model": "language_model",
        "projector": "multi_modal_projector",
        "vision_tower": "vision_tower",
    }
    for part, name in names.items():
        assert any(name in target for target in model.targeted_module_names) == (part in parts)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    batch = tiny_batch(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(
            **batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
        ).loss.backward()
        optimizer.step()
    assert all(grad is not None and grad.any() for grad in gradients(model).values())


def test_an_adapter_is_trained_on():
    first = prepare(pitome_vlm.wrap(tiny_model(), tokens=30), LoraOptions(rank=2))
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    again = prepare(first)
    assert again is first
    assert any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match="already has an adapter"):
        prepare(first, LoraOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"parts": ()}, "parts"),
        ({"parts": ("head",)}, "language_model, projector, vision_tower"),
    ],
    ids=str,
)
def test_lora_options_out_of_range(options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        LoraOptions(**options)


def test_an_unwrapped_model_is_refused(checkpoint, data, tmp_path):
    model, processor = pitome_vlm.load(checkpoint)
    with pytest.raises(ValueError, match="not wrapped"):
        train(model, processor, data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"not wrapped.*keep=1\.0"):
        prepare(model)


# --- metrics

LABELS = st.lists(st.lists(st.sampled_from([-100, 1, 2]), min_size=6, max_size=6), min_size=1)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 2**31))
def test_metrics_count_tokens_and_whole_answers(labels, seed):
    generator = np.random.default_rng(seed)
    guesses = generator.integers(1, 3, (len(labels), 6))

    class Prediction:
        predictions, label_ids = guesses, np.array(labels)

    tokens, answers = [], []
    for row, wanted in enumerate(labels):
        run = []
        for place in range(1, 6):
            if wanted[place] == -100:
                answers += [all(run)] if run else []
                run = []
            else:
                run.append(guesses[row, place - 1] == wanted[place])
                tokens.append(run[-1])
        answers += [all(run)] if run else []
    found = answer_metrics(Prediction())
    assert found["answers"] == len(answers)
    assert found["token_accuracy"] == pytest.approx(np.mean(tokens) if tokens else 0)
    assert found["answer_accuracy"] == pytest.approx(np.mean(answers) if answers else 0)


# --- the Trainer


def trainer_of(model, processor, data, folder, **options):
    budgets = options.pop("budgets", ())
    options = {"per_device_train_batch_size": 2, "save_strategy": "no"} | options
    conversations = open_conversations(data)
    return MergingTrainer(
        model=prepare(model, LoraOptions(rank=4)),
        args=training_arguments(folder, torch.device("cpu"), progress=False, **options),
        train_dataset=conversations,
        eval_dataset=conversations,
        data_collator=Collator(processor),
        budgets=budgets,
    )


class TestTrainer:
    def test_predict_has_logits_and_labels_of_one_length(self, checkpoint, data, tmp_path):
        trainer = trainer_of(*loaded(checkpoint), data, tmp_path)
        result = trainer.predict(trainer.eval_dataset)
        assert result.predictions.shape == result.label_ids.shape
        assert result.predictions.shape[1] < 144
        assert result.metrics["test_answers"] == 12

    def test_evaluation_is_that_of_the_model_alone(self, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        trainer = trainer_of(model, processor, data, tmp_path, per_device_eval_batch_size=12)
        metrics = trainer.evaluate()
        batch = batch_of(processor, data, 12)
        with torch.no_grad():
            output = trainer.model.eval()(**batch)
        assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)

    def test_label_smoothing_compares_with_the_next_token(self, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        trainer = trainer_of(model, processor, data, tmp_path, label_smoothing_factor=0.2)
        batch = shorten(trainer.model, batch_of(processor, data))
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            logits = trainer.model(**batch).logits[:, :-1]
            found = trainer.compute_loss(trainer.model, dict(batch))
        counted = labels != -100
        logs = logits[counted].log_softmax(-1)
        hits = logs.gather(1, labels[counted][:, None]).mean()
        torch.testing.assert_close(found, -(0.8 * hits + 0.2 * logs.mean()))
        before = trainer.evaluate()["eval_loss"]
        trainer.args.max_steps, trainer.args.learning_rate = 6, 5e-3
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before

    def test_a_plain_trainer_works_with_the_collator(self, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
        )
        conversations = open_conversations(data)
        trainer = Trainer(
            model=model,
            args=arguments,
            eval_dataset=conversations,
            data_collator=ShorteningCollator(model, Collator(processor)),
        )
        result = trainer.predict(
            conversations, ignore_keys=[CACHE_NAME, "image_hidden_states", "image_outputs"]
        )
        logits = result.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        assert logits.shape[:2] == result.label_ids.shape

    def test_budgets_are_drawn_by_seed_and_step(self, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        trainer = trainer_of(
            model,
            processor,
            data,
            tmp_path,
            budgets=[8, 36, 0.5],
            max_steps=8,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=12,
            seed=3,
        )
        seen = []
        base = trainer.model.get_base_model()
        base.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(schedule_of(trainer.model).tokens_out),
            with_kwargs=True,
        )
        trainer.train()
        drawn = [schedule_with(base, trainer.step_config(step)) for step in range(8)]
        # Both batches of a step share its budget.
        assert seen == [count for count in drawn for _ in range(2)]
        assert set(seen) == {8, 36, 72}
        seen.clear()
        trainer.evaluate()
        assert set(seen) == {16}
        assert merge_config(trainer.model).tokens == 16

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_images_of_different_counts(self, checkpoint, data, tmp_path, smoothing):
        options = {"label_smoothing_factor": smoothing, "max_steps": 3, "learning_rate": 5e-3}
        options["per_device_eval_batch_size"] = 12
        model, processor = loaded(checkpoint, tokens=None, keep="auto")
        trainer = trainer_of(model, processor, data, tmp_path, **options)
        before = trainer.evaluate()
        assert before["eval_answers"] == 12
        trainer.train()
        result = trainer.predict(trainer.eval_dataset)
        assert result.predictions.shape == result.label_ids.shape
        assert result.metrics["test_loss"] < before["eval_loss"]

    def test_the_card_is_the_adapter_s(self, checkpoint, data, tmp_path):
        trainer = trainer_of(*loaded(checkpoint), data, tmp_path)
        trainer.create_model_card(model_name="x")
        text = (tmp_path / "README.md").read_text()
        assert "16 of 144 visual tokens" in text

    def test_a_budget_that_does_not_fit_is_refused(self, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        for wrong in (1000, 0, 1.5):
            with pytest.raises(ValueError, match=r"tokens|keep"):
                train(model, processor, data, tmp_path / "out", budgets=[16, wrong])
        assert not (tmp_path / "out").exists()


def schedule_with(model, config) -> int:
    with pitome_vlm.wrapped(model, config=config):
        return schedule_of(model).tokens_out


# --- train()


@pytest.fixture(scope="module")
def result(checkpoint, data, tmp_path_factory):
    model, processor = loaded(checkpoint)
    return train(
        model,
        processor,
        data,
        tmp_path_factory.mktemp("run") / "out",
        val_data=data,
        lora=LoraOptions(rank=16, parts=PARTS),
        learning_rate=1e-2,
        num_train_epochs=6,
        per_device_train_batch_size=6,
        eval_strategy="steps",
        eval_steps=6,
        logging_steps=2,
        save_strategy="no",
    )


class TestTrain:
    def test_loss_falls(self, result):
        losses = [entry["loss"] for entry in result.history if "loss" in entry]
        assert losses[-1] < 0.6 * losses[0]
        evaluated = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
        assert len(evaluated) == 2
        assert result.steps == 12

    def test_before_is_the_merged_untrained_model(self, result, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        untrained = trainer_of(model, processor, data, tmp_path).evaluate()
        assert result.before["loss"] == pytest.approx(untrained["eval_loss"], rel=1e-5)
        assert result.before["answer_accuracy"] == untrained["eval_answer_accuracy"]
        assert result.after["loss"] < result.before["loss"]

    def test_answer_accuracy_is_what_generate_would_get_right(self, result, checkpoint, data):
        _, processor = loaded(checkpoint)
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        conversations = open_conversations(data)
        right = 0
        for index, row in enumerate(rows):
            question, answer = (turn["value"] for turn in row["conversations"])
            prompt = f"user: <image> {question.removeprefix('<image>')} assistant:"
            inputs = processor(
                text=prompt, images=conversations[index].images[0], return_tensors="pt"
            )
            out = result.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            written = processor.tokenizer.decode(new, skip_special_tokens=False)
            right += written.split("</s>")[0].strip() == answer and "</s>" in written
        assert right == round(result.after["answer_accuracy"] * 12)
        assert right > 0

    def test_the_model_is_left_in_order(self, result):
        assert isinstance(result.model, PeftModel)
        assert not result.model.training
        assert is_wrapped(result.model)
        assert "forward" not in result.model.__dict__
        pitome_vlm.unwrap(result.model)
        pitome_vlm.wrap(result.model, tokens=16)

    def test_nothing_is_overwritten(self, result, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        kept = (result.output_dir / "adapter_model.safetensors").read_bytes()
        for resume in (False, True):
            with pytest.raises(FileExistsError, match="finished adapter"):
                train(model, processor, data, result.output_dir, resume=resume)
        assert (result.output_dir / "adapter_model.safetensors").read_bytes() == kept
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="not empty"):
            train(model, processor, data, tmp_path)
        with pytest.raises(ValueError, match="does not hold a training run"):
            train(model, processor, data, tmp_path, resume=True)
        with pytest.raises(ValueError, match="does not hold a training run"):
            train(model, processor, data, tmp_path, overwrite=True)
        assert (tmp_path / "mine.txt").read_text() == "mine"
        with pytest.raises(NotADirectoryError, match="is a file"):
            train(model, processor, data, tmp_path / "mine.txt")

    def test_bfloat16_and_checkpointing(self, checkpoint, data, tmp_path):
        model, processor = loaded(checkpoint)
        result = train(
            model,
            processor,
            data,
            tmp_path / "out",
            val_fraction=0.25,
            max_steps=3,
            bf16=True,
            gradient_checkpointing=True,
        )
        assert result.after["loss"] < result.before["loss"]
        assert "forward" not in result.model.__dict__
        pitome_vlm.unwrap(result.model)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"learning_rte": 1}, "learning_rte.*learning_rate"),
            ({"val_data": "x", "val_fraction": 0.1}, "only one of val_data and val_fraction"),
            ({"val_fraction": 2}, "val_fraction"),
            ({"report_to": "wandb"}, "wandb"),
        ],
        ids=str,
    )
    def test_wrong_options_are_named_before_anything_happens(
        self, checkpoint, data, tmp_path, options, said
    ):
        model, processor = loaded(checkpoint)
        with pytest.raises((ValueError, ImportError), match=said):
            train(model, processor, data, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_a_single_question_is_enough(checkpoint, tmp_path):
    rows = records(tmp_path, 1)
    file = write_lines(tmp_path / "one.jsonl", [record(rows[0]["image"], "what ?", "circle")])
    model, processor = loaded(checkpoint)
    assert train(model, processor, file, tmp_path / "out", max_steps=1).steps == 1
