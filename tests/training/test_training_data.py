"""Training data: both formats, everything that can be wrong with them, labels, shortening."""

from __future__ import annotations

import io
import json

import pytest
import torch
from checkpoint import save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import IMAGE, KINDS, tiny_batch, tiny_model
from training_data import record, records, write_lines

import pitome_vlm
from pitome_vlm.demo.processor import build_processor, vocabulary
from pitome_vlm.training import (
    Collator,
    DataError,
    ShorteningCollator,
    from_dataset,
    from_records,
    open_conversations,
    read_llava,
    shorten,
    train,
)

WORDS = vocabulary()
RED = Image.new("RGB", (120, 120), "red")
CHAT = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "circle"}]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    records(folder, 6)
    return folder


def refused(source, *said, **options):
    with pytest.raises(DataError) as caught:
        open_conversations(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert str(part) in text, text
    return text


# --- LLaVA's format


class TestLlavaFormat:
    def test_lines_and_list_are_the_same_data(self, images, tmp_path):
        rows = records(images, 6)
        lines = read_llava(write_lines(tmp_path / "a.jsonl", rows), image_folder=images)
        (tmp_path / "a.json").write_text(json.dumps(rows))
        listed = read_llava(tmp_path / "a.json", image_folder=images)
        assert [c.messages for c in lines.conversations] == [
            c.messages for c in listed.conversations
        ]
        assert [len(lines), lines[3].images[0].size] == [6, (192, 192)]
        first = lines.conversations[0].messages
        assert first[0].text == "<image>\n" + rows[0]["conversations"][0]["value"].split("\n")[1]
        assert [message.role for message in first] == ["user", "assistant"]

    def test_images_are_next_to_the_file_by_default(self, images):
        file = write_lines(images / "b.jsonl", records(images, 2))
        assert len(read_llava(file)[1].images) == 1

    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            ({"image": None}, ["1 <image>", "0 images"]),
            ({"image": ["0.png", "0.png"]}, ["1 <image>", "2 images"]),
            ({"image": "nope.png"}, ["no such image file", "nope.png"]),
            ({"image": ""}, ["image is empty"]),
            ({"conversations": []}, ["conversations must be a list"]),
            ({"conversations": "hello"}, ["conversations must be a list", "hello"]),
            ({"conversations": [{"from": "gpt", "value": "x"}]}, ["<image>"]),
            (
                {"conversations": [{"from": "human", "value": "<image> x"}]},
                ["question and answer", "user"],
            ),
            (
                {"conversations": [{"from": "human", "value": v} for v in ("<image>", "x")]},
                ["question and answer", "user, user"],
            ),
            ({"conversations": [{"from": "bird", "value": "x"}]}, ["[0]", "bird", "human"]),
            ({"conversations": [{"from": "human", "value": 3}]}, ["[0]", "must be a string"]),
            ({"conversations": [{"from": "human", "value": " "}]}, ["[0]", "empty"]),
            ({"conversations": ["x"]}, ["[0]", "must be an object"]),
            ({"messages": []}, ["both conversations and messages"]),
            (
                {"conversations": [{"from": ["human"], "value": "x"}]},
                ["[0]", "the speaker must be one of", "got ['human']"],
            ),
            (
                {"conversations": [{"from": "human", "value": "a \udc00 b"}]},
                ["[0]", "half of a character", r"'\udc00'"],
            ),
            (
                {
                    "conversations": [
                        {"from": "human", "value": "<image>"},
                        {"from": "gpt", "value": "<image>"},
                    ]
                },
                ["[1]", "only the user can show images"],
            ),
        ],
        ids=str,
    )
    def test_a_wrong_record_is_named_by_its_line(self, images, tmp_path, edit, said):
        rows = records(images, 4)
        rows[2] |= edit
        file = write_lines(tmp_path / "bad.jsonl", rows)
        refused(file, f"{file.name} line 3", *said, image_folder=images)
        (tmp_path / "bad.json").write_text(json.dumps(rows))
        refused(tmp_path / "bad.json", "record 2 (id 2)", *said, image_folder=images)

    def test_a_message_may_hold_its_images(self, images, tmp_path):
        for source in ({"image": "0.png"}, {"path": "0.png"}, {"url": str(images / "0.png")}):
            content = [{"type": "image", **source}, {"type": "text", "text": "what ?"}]
            row = {"messages": [{"role": "user", "content": content}, CHAT[1]]}
            data = read_llava(write_lines(tmp_path / "m.jsonl", [row]), image_folder=images)
            assert data.conversations[0].messages[0].text == "<image>what ?"
            assert data[0].images[0].size == (192, 192)
            twice = write_lines(tmp_path / "m.jsonl", [row | {"image": "0.png"}])
            refused(twice, "line 1: has images of its own and in", image_folder=images)
        row["messages"][0]["content"].append({"type": "image"})
        mixed = write_lines(tmp_path / "m.jsonl", [row])
        refused(mixed, "line 1: 2 <image> in the text, but 1 image", image_folder=images)

    def test_a_line_without_image_is_refused_and_can_be_allowed(self, images, tmp_path):
        plain = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}]}
        file = write_lines(tmp_path / "mixed.jsonl", [*records(images, 1), plain])
        refused(file, "line 2", "no image", "text_only", image_folder=images)
        data = open_conversations(file, image_folder=images, text_only=True)
        assert data.has_text_only
        assert data[1].images == ()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "holds no conversation"),
            ("\n\n", "holds no conversation"),
            ("[]", "holds no conversation"),
            ('{"image": "x"', "line 1 is not valid JSON"),
            ("[1, 2", "line 1 is not valid JSON"),
            ("[1]", "record 0: must be a JSON object"),
            ('"x"', "line 1: must be a JSON object"),
            ("{}", "neither conversations nor messages"),
        ],
    )
    def test_damaged_files(self, tmp_path, text, said):
        (tmp_path / "x.json").write_text(text)
        refused(tmp_path / "x.json", "x.json", said)

    def test_no_text_at_all(self, tmp_path):
        (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
        refused(tmp_path / "x.jsonl", "UTF-8")

    def test_missing_file_and_folder(self, images, tmp_path):
        for name in (tmp_path / "no.jsonl", "./no.jsonl", "no.jsonl"):
            with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
                open_conversations(name)
        file = write_lines(tmp_path / "c.jsonl", records(images, 1))
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read_llava(file, image_folder=tmp_path / "nowhere")

    def test_an_image_damaged_later_is_named_with_its_line(self, images, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG not an image")
        data = from_records([record("broken.png", "what ?", "x")], image_folder=tmp_path)
        with pytest.raises(DataError, match=r"records\[0\].*broken\.png"):
            data[0]

    def test_holding_out(self, images):
        data = from_records(records(images, 6), image_folder=images)
        rest, held = data.split(0.34, seed=1)
        assert (len(rest), len(held)) == (4, 2)
        again = data.split(0.34, seed=1)[1]
        assert [c.where for c in held.conversations] == [c.where for c in again.conversations]
        assert held.fingerprint == again.fingerprint != rest.fingerprint
        everything = {c.where for c in (*rest.conversations, *held.conversations)}
        assert everything == {c.where for c in data.conversations}
        place = data.conversations.index(held.conversations[0])
        assert held[0].images[0].tobytes() == data[place].images[0].tobytes()
        for wrong in (0, 1, 1.5, 0.99):
            with pytest.raises(ValueError, match="val_fraction"):
                data.split(wrong)


def test_nothing_is_written_before_the_data_are_checked(images, tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    model, processor = pitome_vlm.load(folder, tokens=16)
    rows = records(images, 3)
    rows[1]["image"] = "gone.png"
    file = write_lines(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=r"line 2: no such image file: .*gone\.png"):
        train(model, processor, file, tmp_path / "out", image_folder=images)
    assert not (tmp_path / "out").exists()
    assert not hasattr(model, "peft_config")


# --- Hugging Face datasets


def dataset(**columns):
    import datasets

    return datasets.Dataset.from_dict(columns)


class TestHuggingFaceDatasets:
    def test_images_and_messages(self):
        import datasets

        two = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same ?"}]
        chat = [{"role": "user", "content": two}, {"role": "assistant", "content": CHAT[1:]}]
        chat[1]["content"] = [{"type": "text", "text": "yes"}]
        rows = dataset(images=[[RED] * 2] * 2, messages=[chat] * 2)
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
        data = from_dataset(rows)
        assert len(data[1].images) == 2
        assert data.conversations[0].messages[0].text == "<image><image>same ?"

    def test_plain_text_gets_its_images_first(self):
        data = from_dataset(dataset(images=[[RED]], messages=[CHAT]))
        assert data.conversations[0].messages[0].text == "<image>what is it ?"
        assert data[0].images[0].size == (120, 120)

    def test_one_image_column_and_llava_turns(self):
        turns = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]
        assert len(from_dataset(dataset(image=[RED], conversations=[turns]))[0].images) == 1

    def test_images_on_disk(self, tmp_path):
        RED.save(tmp_path / "a.png")
        data = from_dataset(dataset(image=[str(tmp_path / "a.png")], messages=[CHAT]))
        assert data[0].images[0].size == (120, 120)
        wrong = dataset(image=[str(tmp_path / "a.png"), "gone.png"], messages=[CHAT, CHAT])
        with pytest.raises(DataError, match=r"row 1: no such image file: /.*gone\.png"):
            from_dataset(wrong, name="mine")

    def test_a_saved_dataset_is_opened_by_its_folder(self, tmp_path):
        dataset(images=[[RED]], messages=[CHAT]).save_to_disk(str(tmp_path / "saved"))
        assert len(open_conversations(tmp_path / "saved")) == 1

    def test_selected_rows_keep_their_images(self):
        colours = [Image.new("RGB", (8, 8), name) for name in ("red", "blue", "green")]
        data = from_dataset(dataset(image=colours, messages=[CHAT] * 3).select([2, 0]))
        assert data[0].images[0].getpixel((0, 0)) == (0, 128, 0)

    def test_wrong_rows_are_named(self):
        rows = dataset(images=[[RED], []], messages=[CHAT, CHAT])
        with pytest.raises(DataError, match="row 1: has no image"):
            from_dataset(rows)
        assert len(from_dataset(rows, text_only=True)) == 2
        with pytest.raises(DataError, match=r"messages.*images.*has a"):
            from_dataset(dataset(a=[1]))
        marked = [{"role": "user", "content": "<image> <image> x"}, CHAT[1]]
        with pytest.raises(DataError, match="row 0: 2 <image> in the text, but 1 image"):
            from_dataset(dataset(images=[[RED]], messages=[marked]))

    def test_turns_may_be_lists_of_fields(self):
        import datasets

        turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
        turns = {"from": ["human", "gpt"], "value": ["<image> a", "b"]}
        rows = datasets.Dataset.from_dict(
            {"image": [RED], "conversations": [turns]},
            features=datasets.Features(
                {"image": datasets.Image(), "conversations": datasets.Sequence(turn)}
            ),
        )
        texts = [message.text for message in from_dataset(rows).conversations[0].messages]
        assert texts == ["<image> a", "b"]

    def test_images_in_messages(self, images):
        content = [{"type": "image", "path": str(images / "0.png")}]
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        chat[1]["content"] = [{"type": "text", "text": "one"}]
        data = from_dataset(dataset(messages=[chat]), text_only=True)
        assert data[0].images[0].size == (192, 192)

    def test_columns_that_cannot_be_used_are_named(self, tmp_path):
        import datasets

        for columns, said in {
            "no images": (
                {"image": [[[1, 2]]]},
                "column image must hold images, as paths or bytes",
            ),
            "numbers": ({"images": [[7]]}, "column images must hold images, as paths or bytes"),
            "two of images": ({"image": [RED], "images": [[RED]]}, "has columns images and image"),
            "two of turns": ({"image": [RED], "conversations": [CHAT]}, "has columns messages and"),
        }.values():
            with pytest.raises(DataError, match=said):
                from_dataset(dataset(messages=[CHAT], **columns))
        rows = dataset(images=[[RED]], messages=[CHAT])
        with pytest.raises(TypeError, match=r"has a transform .* dataset\.map"):
            from_dataset(rows.with_transform(lambda batch: batch))
        datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "splits"))
        refused(tmp_path / "splits", "has no split 'train', but test")
        assert len(open_conversations(tmp_path / "splits", split="test")) == 1

    def test_what_is_no_data_is_named(self):
        for wrong in (None, 7, {"image": ["a.png"], "messages": [CHAT]}):
            with pytest.raises(TypeError, match="must be a file, a dataset or a list of records"):
                open_conversations(wrong)

    def test_what_is_no_single_split_is_refused(self):
        import datasets

        rows = dataset(images=[[RED]], messages=[CHAT])
        for wrong in (datasets.DatasetDict(train=rows), rows.to_iterable_dataset()):
            with pytest.raises(TypeError, match="one split"):
                from_dataset(wrong)

    def test_an_image_in_memory(self):
        data = from_records([{"images": [RED], "messages": CHAT}])
        assert data[0].images[0].size == (120, 120)
        stored = io.BytesIO()
        RED.save(stored, "PNG")
        data = from_records([{"image": {"bytes": stored.getvalue()}, "messages": CHAT}])
        assert data[0].images[0].size == (120, 120)


# --- labels

TEXT = st.lists(st.sampled_from(["red", "circle", "one", "yes", "left"]), min_size=1, max_size=4)
TURN = st.tuples(st.integers(0, 2), TEXT, TEXT)


def conversations(turns):
    chat = []
    for images, question, answer in turns:
        chat.append({"from": "human", "value": "<image>" * images + " ".join(question)})
        chat.append({"from": "gpt", "value": " ".join(answer)})
    shown = [RED] * sum(images for images, _, _ in turns)
    return {"images": shown, "conversations": chat}


def expected(turns) -> tuple[list[int], list[int]]:
    """Ids and labels, word by word: the demo's tokenizer knows words only."""
    ids, labels = [WORDS["<s>"]], [-100]

    def add(words, counted):
        ids.extend(WORDS[word] for word in words)
        labels.extend(WORDS[word] if counted else -100 for word in words)

    for images, question, answer in turns:
        add(["user:", *["<image>"] * (144 * images), *question, "assistant:"], False)
        add([*answer, "</s>"], True)
    return ids, labels


class TestLabels:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.lists(TURN, min_size=1, max_size=3), min_size=1, max_size=3))
    def test_labels_are_the_answers_and_their_ends(self, rows):
        data = from_records([conversations(turns) for turns in rows], text_only=True)
        batch = Collator(build_processor())([data[i] for i in range(len(data))])
        count = sum(images for turns in rows for images, _, _ in turns)
        assert ("pixel_values" in batch) == (count > 0)
        if count:
            assert len(batch["pixel_values"]) == count
        for row, turns in enumerate(rows):
            ids, labels = expected(turns)
            length = len(ids)
            assert batch["input_ids"][row, :length].tolist() == ids
            assert batch["labels"][row, :length].tolist() == labels
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
                batch["labels"].shape[1] - length
            )
            assert (batch["labels"][row, length:] == -100).all()

    def test_a_template_without_end_tokens_gets_them(self):
        processor = build_processor()
        processor.chat_template = processor.chat_template.replace("'</s> '", "''")
        data = from_records([conversations([(1, ["red"], ["one"]), (0, ["left"], ["yes"])])])
        batch = Collator(processor)([data[0]])
        labels = batch["labels"][0]
        words = ["one", "</s>", "yes", "</s>"]
        assert labels[labels != -100].tolist() == [WORDS[word] for word in words]

    def test_without_a_template_llava_s_own_format_is_used(self):
        processor = build_processor()
        processor.chat_template = None
        data = from_records([conversations([(1, ["red"], ["one"])])])
        rendered = Collator(processor).render(data.conversations[0])
        assert rendered.text == "USER: <image>\nred ASSISTANT: one</s>"
        assert [rendered.text[a:b] for a, b in rendered.answers] == [" one</s>"]

    def test_a_system_turn_is_context(self):
        chat = [{"role": "system", "content": "look"}, *CHAT]
        data = from_records([{"images": [RED], "messages": chat}])
        labels = Collator(build_processor())([data[0]])["labels"]
        assert labels[labels != -100].tolist() == [WORDS["circle"], WORDS["</s>"]]

    def test_a_template_that_rewrites_earlier_turns_is_refused(self):
        processor = build_processor()
        processor.chat_template = "{{ messages | length }} " + processor.chat_template
        data = from_records([conversations([(1, ["red"], ["one"])])])
        with pytest.raises(DataError, match=r"records\[0\].*chat template"):
            Collator(processor)([data[0]])

    def test_a_template_that_fails_is_named_with_the_record(self):
        processor = build_processor()
        processor.chat_template = "{{ raise_exception('no such turn') }}"
        data = from_records([conversations([(1, ["red"], ["one"])])])
        with pytest.raises(
            DataError, match=r"^records\[0\]: .*template cannot write.*no such turn"
        ):
            Collator(processor)([data[0]])

    def test_what_is_no_processor_is_refused(self):
        for wrong in (build_processor().tokenizer, build_processor().image_processor, None):
            with pytest.raises(TypeError, match="processor must be the model's, with a tokenizer"):
                Collator(wrong)

    def test_a_slow_tokenizer_is_refused(self):
        class Slow:
            is_fast = False

        processor = build_processor()
        processor.tokenizer = Slow()
        with pytest.raises(ValueError, match="offsets"):
            Collator(processor)

    def test_tokens_with_a_meaning_of_their_own_are_refused_in_texts(self):
        processor = build_processor()
        processor.video_token = "<video>"
        for turn, text, said in (
            (1, "one </s> more", "the answer holds the end token '</s>'"),
            (1, "one</s>", "remove it, one is added at the end"),
            (0, "a <video> ?", "the text holds '<video>'"),
        ):
            chat = [*CHAT]
            chat[turn] = chat[turn] | {"content": text}
            data = from_records([{"messages": chat}], text_only=True)
            with pytest.raises(DataError, match=rf"records\[0\]: turn {turn}: .*{said}"):
                Collator(processor)([data[0]])

    def test_an_image_that_a_processor_refuses_is_named_with_its_record(self, monkeypatch):
        processor = build_processor()
        prepare = type(processor.image_processor).preprocess

        def picky(self, images, *args, **kwargs):
            shown = images if isinstance(images, list) else [images]
            if any(image.width > 200 * image.height for image in shown):
                raise ValueError("absolute aspect ratio must be smaller than 200")
            return prepare(self, images, *args, **kwargs)

        monkeypatch.setattr(type(processor.image_processor), "preprocess", picky)
        long = RED.resize((300, 1))
        data = from_records([{"image": image, "messages": CHAT} for image in (RED, long, RED)])
        with pytest.raises(DataError, match=r"^records\[1\]: .*ValueError: absolute aspect ratio"):
            Collator(processor)([data[0], data[1], data[2]])

    def test_long_rows_are_cut_but_never_through_an_image(self):
        data = from_records([conversations([(1, ["red"], ["one", "yes"])])])
        whole = Collator(build_processor())([data[0]])
        width = whole["input_ids"].shape[1]
        cut = Collator(build_processor(), max_length=width - 2)([data[0]])
        assert cut["labels"].shape == cut["input_ids"].shape == (1, width - 2)
        assert torch.equal(cut["labels"], whole["labels"][:, :-2])
        with pytest.raises(DataError, match="max_length=100 would cut an image"):
            Collator(build_processor(), max_length=100)([data[0]])


# --- shortening


def labelled(kind, **options):
    batch = tiny_batch(kind, **options)
    ignored = (batch["input_ids"] == IMAGE) | (batch["attention_mask"] == 0)
    return batch | {"labels": batch["input_ids"].masked_fill(ignored, -100)}


class TestShorten:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_model_computes_the_same_and_lengths_agree(self, kind, side):
        model = pitome_vlm.wrap(tiny_model(kind), tokens=30)
        batch = labelled(kind, images=(1, 2, 0), texts=(5, 9, 4), side=side)
        short = shorten(model, batch)
        ours, theirs = model(**short), model(**batch)
        compact = pitome_vlm.compact_inputs(model, **batch)
        assert short["labels"].shape == ours.logits.shape[:2] == compact["labels"].shape
        assert torch.equal(short["labels"], compact["labels"])
        torch.testing.assert_close(ours.logits, theirs.logits)
        torch.testing.assert_close(ours.loss, theirs.loss)

    def test_without_mask_rows_that_become_ragged_get_one(self):
        model, batch = pitome_vlm.wrap(tiny_model(), tokens=30), labelled("clip", images=(1, 1))
        other = labelled("clip", images=(2, 0), texts=(5, 5), seed=3)
        for one in (batch, other):
            del one["attention_mask"]
            torch.testing.assert_close(model(**shorten(model, one)).logits, model(**one).logits)

    def test_what_needs_no_shortening_comes_back(self):
        batch = labelled("clip")
        plain, whole = tiny_model(), pitome_vlm.wrap(tiny_model(), keep=1.0)
        model = pitome_vlm.wrap(tiny_model(), tokens=30)
        text = labelled("clip", images=(0,), texts=(4,))
        auto = pitome_vlm.wrap(tiny_model(), keep="auto")
        for one, same in ((plain, batch), (whole, batch), (model, text), (auto, batch)):
            assert shorten(one, same) == same
        twice = shorten(model, shorten(model, batch))
        assert torch.equal(twice["input_ids"], shorten(model, batch)["input_ids"])

    def test_images_that_would_fill_one_exactly_are_left_to_the_model(self):
        model = pitome_vlm.wrap(tiny_model(), keep=0.25)
        ids = torch.tensor([[1, *[IMAGE] * (4 * 144), 5, 6]])
        batch = {"input_ids": ids, "pixel_values": torch.randn(4, 3, 96, 96)}
        assert torch.equal(shorten(model, batch)["input_ids"], ids)
        assert model(**shorten(model, batch)).logits.shape[1] == 1 + 4 * 36 + 2

    def test_wrong_counts_and_positions_are_refused(self):
        model, batch = pitome_vlm.wrap(tiny_model(), tokens=30), labelled("clip")
        with pytest.raises(ValueError, match="432 image placeholders for 2 images"):
            shorten(model, batch | {"pixel_values": batch["pixel_values"][:2]})
        with pytest.raises(ValueError, match="position_ids"):
            shorten(model, batch | {"position_ids": torch.zeros_like(batch["input_ids"])})

    def test_other_values_per_token_are_shortened_with_it(self):
        model, batch = pitome_vlm.wrap(tiny_model(), tokens=30), labelled("clip")
        marks = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
        short = ShorteningCollator(model, lambda rows: rows | {"marks": marks})(batch)
        kept = short["input_ids"] != IMAGE
        kept &= short["attention_mask"] != 0
        assert torch.equal(
            batch["input_ids"].flatten()[short["marks"][kept]], short["input_ids"][kept]
        )


def test_a_name_is_asked_for_once_where_there_is_no_network(monkeypatch, tmp_path):
    asked = []

    def no_network(name, file, **source):
        asked.append((name, source))
        raise RuntimeError("no route to host")

    monkeypatch.setattr("pitome_vlm.loading.checkpoints.file_exists", no_network)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: {}["asked again"])
    for name in ("some-org/no-such-data", "no-such-data"):
        with pytest.raises(DataError, match=f"^{name} is no file or folder, and .*no route to"):
            open_conversations(name)
    assert asked == [(name, {"repo_type": "dataset"}) for name, _ in asked]
    assert len(asked) == 2
    # What was downloaded before is still found.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "some-org___no-such-data").mkdir()
    with pytest.raises(DataError, match="cannot be loaded as a dataset: 'asked again'"):
        open_conversations("some-org/no-such-data")
