"""What every measurement shares: statistics, stores, plots, tables, provenance, asking."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.demo.processor import build_processor
from pitome_vlm.loading import load
from pitome_vlm.measure import asking, demo_benchmark, plots, stats, store, tables
from pitome_vlm.measure.provenance import (
    checkpoint_fingerprint,
    in_words,
    machine,
    model_fingerprint,
    provenance,
    versions,
)
from pitome_vlm.measure.store import Store


@pytest.fixture(scope="module")
def demo():
    return load(str(checkpoint_path()), dtype=torch.float32)


def images_of(count: int, questions: int) -> list[int]:
    return [image for image in range(count) for _ in range(questions)]


class TestIntervals:
    def test_forty_right_answers_on_seven_images_are_no_certainty(self):
        clusters = [i % 7 for i in range(40)]
        low, high = stats.mean_interval([1.0] * 40, clusters)
        assert 0.8 < low < 1
        assert high == 1
        assert tables.percent_interval(low, high) == "90.6 to 100.0"
        low, high = stats.mean_interval([0.0] * 40, clusters)
        assert low == 0
        assert 0 < high < 0.2

    def test_demo_accuracies_are_percentages_with_the_added_images(self):
        samples, right = load_split("test", 40), np.ones(40, bool)
        assert len({sample.scene_id for sample in samples}) == 7
        low, high = demo_benchmark.accuracy_interval(samples, right)
        assert 85 < low < 100 == high
        ((low, high),) = demo_benchmark.difference_intervals(samples, [0.0 * right])
        assert -10 < low < 0 < high < 10

    def test_no_difference_is_no_certainty_and_lies_around_zero(self):
        low, high = stats.difference_interval([1.0] * 40, [1.0] * 40, [i % 7 for i in range(40)])
        assert low < 0 < high
        assert low == pytest.approx(-high, abs=0.02)

    def test_beyond_the_most_resampled_the_ends_nearly_stay(self, monkeypatch):
        rng = np.random.default_rng(3)
        values, clusters = (rng.random(2400) < 0.8).astype(float), images_of(400, 6)
        resampled = stats.mean_interval(values, clusters)
        monkeypatch.setattr(stats, "MOST_RESAMPLED", 100)
        assert stats.mean_interval(values, clusters) == pytest.approx(resampled, abs=2e-3)

    def test_questions_about_one_image_are_not_independent(self):
        rng = np.random.default_rng(0)
        clusters = np.repeat(np.arange(400), rng.integers(1, 6, 400))
        values = (rng.random(len(clusters)) < rng.random(400)[clusters]).astype(float)
        low, high = stats.mean_interval(values, clusters.tolist())
        assert high - low > 1.2 * 2 * 1.96 * values.std() / len(values) ** 0.5

    def test_intervals_cover_the_truth_about_as_often_as_they_say(self):
        covered, clusters = 0, images_of(30, 4)
        for seed in range(120):
            rng = np.random.default_rng(seed)
            # Questions about one image are alike, which an interval over questions would miss.
            values = (rng.random(120) < np.repeat(rng.choice([0.6, 1.0], 30), 4)).astype(float)
            low, high = stats.mean_interval(values, clusters)
            covered += low <= 0.8 <= high
        assert 0.9 <= covered / 120 <= 1

    def test_a_family_is_wrong_about_any_of_its_means_as_often_as_it_says(self):
        clusters, wrong, single = images_of(30, 4), 0, 0
        for seed in range(50):
            rng = np.random.default_rng(seed)
            # Twenty differences of nothing, the questions of an image alike.
            family = np.repeat(rng.choice([-1.0, 0, 0, 1], (20, 30)), 4, axis=1)
            ends = stats.simultaneous_intervals(family, clusters)
            wrong += any(low > 0 or high < 0 for low, high in ends)
            if not seed:
                low, high = stats.mean_interval(family[0], clusters, extremes=(-1, 1))
            single += any(abs(one.mean()) > (high - low) / 2 for one in family)
        assert wrong <= 6
        assert single >= 20

    def test_means_that_move_together_are_corrected_as_one(self):
        rng, clusters = np.random.default_rng(1), images_of(40, 5)
        first = np.repeat(rng.choice([-1.0, 0, 0, 0, 1], 40), 5)
        alone, *copies = stats.simultaneous_intervals([first] * 8, clusters)
        assert copies == [alone] * 7
        (single,) = stats.simultaneous_intervals([first], clusters)
        assert alone == pytest.approx(single)
        pointwise = stats.mean_interval(first, clusters, extremes=(-1, 1))
        assert single == pytest.approx(pointwise, abs=0.03)
        others = [np.repeat(rng.choice([-1.0, 0, 0, 0, 1], 40), 5) for _ in range(8)]
        widest = stats.simultaneous_intervals([first, *others], clusters)[0]
        bonferroni = stats.mean_interval(first, clusters, extremes=(-1, 1), level=1 - 0.05 / 9)
        assert single.high - single.low < widest.high - widest.low
        assert widest.high - widest.low < 1.1 * (bonferroni.high - bonferroni.low)

    def test_means_of_some_questions_only(self):
        values, clusters = np.array([1.0, 0, 1, 1, 0, 1, 1, 0]), images_of(4, 2)
        part = np.where(np.arange(8) < 6, values, np.nan)
        (kept,) = stats.simultaneous_intervals([part], clusters)
        (whole,) = stats.simultaneous_intervals([values], clusters)
        assert kept.high - kept.low > whole.high - whole.low
        assert sum(kept) / 2 == pytest.approx(4 / 8)
        scaled = stats.simultaneous_intervals([100 * part], clusters, extremes=(-100, 100))
        assert scaled[0] == pytest.approx((100 * kept.low, 100 * kept.high))
        assert stats.simultaneous_intervals([], clusters) == []
        # What no image changes is known, and does not widen the others.
        still, found = stats.simultaneous_intervals(
            [np.zeros(8), values], clusters, extremes=[(0, 0), (-1, 1)]
        )
        assert (still, found) == ((0, 0), pytest.approx(whole))
        assert stats.simultaneous_intervals([np.zeros(8)], clusters, extremes=(0, 0)) == [(0, 0)]
        with pytest.raises(ValueError, match="mean 1 of the family is of no question"):
            stats.simultaneous_intervals([values, values * np.nan], clusters)
        with pytest.raises(ValueError, match="got 4 for 8 values"):
            stats.simultaneous_intervals([values], clusters[:4])

    def test_percentages_are_the_same_interval(self):
        values, clusters = np.array([1.0, 0, 1, 1, 0, 1]), [0, 0, 1, 1, 2, 2]
        low, high = stats.mean_interval(values, clusters)
        scaled = stats.mean_interval(100 * values, clusters, extremes=(0, 100))
        assert scaled == pytest.approx((100 * low, 100 * high))

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match="got 2 for 3 values"):
            stats.mean_interval([1, 0, 1], [0, 1])
        with pytest.raises(ValueError, match="at least one"):
            stats.mean_interval([], [])

    def test_a_loss_of_nothing_is_not_defined(self):
        with pytest.raises(ValueError, match="no question right"):
            stats.relative_loss([0.0], [0.0], [0])

    def test_agreement_cannot_gain(self):
        loss = stats.relative_loss([1.0] * 8, [1.0] * 8, range(8), gains=False)
        assert (loss.value, loss.low) == (0, 0)
        assert loss.high > 0


class TestComparisons:
    def test_few_images_are_flipped_exactly(self):
        # Of the 8 sign patterns of (2, 1, 1) two have a sum as far from 0: all agree.
        assert stats.sign_flip([2.0, 1.0, 1.0], [0, 1, 2]) == pytest.approx(2 / 8)
        assert stats.sign_flip([0.0, 0.0], [0, 1]) == 1

    def test_many_images_agree_with_the_normal_approximation(self, monkeypatch):
        differences = np.random.default_rng(0).choice([-1.0, 1.0], 300, p=[0.45, 0.55])
        drawn = stats.sign_flip(differences, range(300))
        monkeypatch.setattr(stats, "MOST_FLIPPED", 10)
        assert stats.sign_flip(differences, range(300)) == pytest.approx(drawn, abs=0.03)

    def test_flips_move_whole_images(self):
        # Ten right answers about a single image are one observation, not ten.
        assert stats.sign_flip(np.ones(10), ["same"] * 10) == 1
        assert stats.sign_flip(np.ones(10), range(10)) < 0.01

    def test_mcnemar_is_a_binomial_test(self):
        assert stats.mcnemar_exact(0, 0) == 1
        assert stats.mcnemar_exact(1, 8) == pytest.approx(20 / 512)
        assert stats.mcnemar_exact(8, 1) == stats.mcnemar_exact(1, 8)

    def test_compare_counts_and_tests(self):
        paired = stats.compare([1, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1])
        assert (paired.lost, paired.gained, paired.difference) == (1, 2, 0.25)
        assert paired.low < 0.25 < paired.high
        graded = stats.compare([0.5, 1], [1, 1], [0, 1])
        assert graded.lost is graded.gained is graded.mcnemar is None
        with pytest.raises(ValueError, match="same questions"):
            stats.compare([1, 0], [1], [0, 1])

    def test_holm_corrects_in_order(self):
        assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
        assert stats.holm([]) == []

    def test_iqr_of_few_values(self):
        assert stats.iqr([3.0]) == 0
        assert stats.iqr([1.0, 2.0, 3.0, 4.0]) == pytest.approx(2.5)


RUN = {"checkpoint": "demo", "batch": 4, "merging": {"keep": 0.5}, "sizes": (1, 2)}


class TestStore:
    @pytest.fixture(params=["folder", "memory"])
    def root(self, request, tmp_path):
        return tmp_path / "run" if request.param == "folder" else None

    def test_cells_come_back_in_the_order_they_were_finished(self, root):
        cells = Store(root, RUN)
        for key in ("b", "a", "c-0.5"):
            cells.put(key, {"answers": [key], "score": np.float64(0.5)}, {"task": key})
        again = cells if root is None else Store(root, RUN)
        assert list(again) == ["b", "a", "c-0.5"]
        assert len(again) == 3
        assert again.get("a", {"task": "a"}) == {"answers": ["a"], "score": 0.5}
        assert again.get("x") is None
        assert "x" not in again

    def test_arrays_come_back(self, root):
        cells, values = Store(root), np.arange(6, dtype=np.float32).reshape(2, 3)
        assert cells.array("reference") is None
        cells.put_array("reference", values)
        assert np.array_equal(cells.array("reference"), values)
        cells.put("a", {})
        cells.clear()
        assert cells.array("reference") is None
        assert len(cells) == 0

    def test_another_run_is_refused_by_name(self, tmp_path):
        Store(tmp_path, RUN).put("a", {}, {"task": "vqa"})
        other = Store(tmp_path, {**RUN, "merging": {"keep": 0.25}})
        with pytest.raises(ValueError, match=r"merging.keep was 0.5, is 0.25"):
            other.get("a", {"task": "vqa"})
        with pytest.raises(ValueError, match="task was 'vqa', is None"):
            Store(tmp_path, RUN).get("a")

    def test_a_folder_with_cells_needs_resume_or_overwrite(self, tmp_path):
        cells = Store(tmp_path, RUN)
        cells.check(resume=False)
        cells.put("a", {})
        with pytest.raises(FileExistsError, match="already holds 1 finished cell; --resume"):
            cells.check(resume=False)
        cells.check(resume=True)
        cells.check(resume=False, overwrite=True)

    def test_results_of_something_else_are_refused(self, tmp_path):
        (tmp_path / "report.md").write_text("mine")
        with pytest.raises(FileExistsError, match=r"already holds report.md"):
            Store(tmp_path).check(resume=True, results=["report.md", "x"])
        Store(tmp_path).check(resume=False, overwrite=True, results=["report.md"])
        file = tmp_path / "report.md"
        for refuse in (Store, lambda path: store.check_files(path, [], overwrite=True)):
            with pytest.raises(ValueError, match="must be a folder"):
                refuse(file)

    def test_a_damaged_cell_says_what_to_do(self, tmp_path):
        cells = Store(tmp_path)
        cells.put("a", {})
        for text, said in (("{", "delete it"), ("[]", "JSON object"), ("{}", "format must be")):
            cells.path("a").write_text(text)
            with pytest.raises(ValueError, match=said):
                Store(tmp_path).get("a")

    def test_memory_has_no_files(self):
        with pytest.raises(ValueError, match="no files"):
            Store(None).path("a")
        with pytest.raises(KeyError, match="a"):
            Store(None).identity_of("a")

    def test_keys_are_file_names(self, tmp_path):
        for key in ("", "../a", "a/b", "a b"):
            with pytest.raises(ValueError, match="key must be"):
                Store(tmp_path).put(key, {})
        assert store.file_name("a/b c") == "a_b_c"

    def test_what_json_cannot_hold_is_stored_without_addresses(self):
        assert "0x" not in store.as_json({"scorer": Store(None)})


class TestPlots:
    def test_no_colour_and_no_style_comes_twice(self):
        assert len(set(plots.colours(60))) == 60
        assert plots.colours(5) == plots.colours(60)[:5]
        styles = [plots.style(index, "x") for index in range(40)]
        assert len({(one["marker"], one["ls"]) for one in styles}) == 40

    def test_the_same_figure_is_the_same_file(self, tmp_path):
        def made():
            drawn, axes = plots.panels(3, 2, 2.0, 1.5)
            axes[0].plot([0, 1], [1, 0], **plots.style(0, "a"))
            assert len(axes) == 3
            return drawn

        assert plots.rendered(made()) == plots.rendered(made())
        path = plots.save(made(), tmp_path / "new" / "plot.pdf")
        assert path.read_bytes().startswith(b"%PDF")

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"a plot needs matplotlib.*viz"):
            plots.figure(1, 1)


class TestTables:
    def test_markdown(self):
        table = tables.Table(
            "Numbers",
            ["method", "right"],
            [["a|b\nc", tables.Cell("red", True)]],
            note="a < b",
            numbers=frozenset({1}),
        )
        assert table.markdown().splitlines() == [
            "## Numbers",
            "",
            "| method | right |",
            "| --- | ---: |",
            "| a\\|b c | ✓ red |",
            "",
            "a &lt; b",
        ]

    def test_rows_of_another_length_are_refused(self):
        with pytest.raises(ValueError, match="'T' must have 2 cells, got 1"):
            tables.Table("T", ["a", "b"], [["only one"]])

    def test_numbers_have_units(self):
        assert tables.flops_text(1.5e9) == "1.500 GFLOP"
        assert tables.bytes_text(900 * 1024) == "900.0 KiB"
        assert tables.bytes_text(5 * 2**40) == "5120 GiB"
        assert tables.bytes_text(12) == "12 B"

    def test_shares_are_shown_as_percent(self):
        assert tables.percent(0.1234) == "12.3"
        assert tables.percent_interval(-0.01, 0.02, signed=True) == "-1.0 to +2.0"


class TestProvenance:
    def test_holds_what_a_reader_needs(self, demo):
        facts = provenance(demo[0], batch_size=4, seed=0)
        wanted = {"hardware", "device", "threads", "dtype", "attention", "batch_size", "seed"}
        assert {*wanted, "python", "torch", "transformers", "pitome_vlm"} <= set(facts)
        assert (facts["dtype"], facts["quantization"]) == ("float32", "none")
        assert facts["hardware"] == machine()["hardware"] == machine("cpu")["hardware"]
        assert "device" in provenance()
        assert in_words({"device": "cpu", "cuda": None, "threads": 1}) == "device cpu, threads 1"
        assert versions("pytest")["pytest"] == pytest.__version__

    def test_fingerprints_tell_weights_apart(self, demo, tmp_path):
        model = demo[0]
        before, weight = model_fingerprint(model), next(model.parameters())
        assert model_fingerprint(model) == before
        old = weight.data.clone()
        weight.data.add_(1)
        assert model_fingerprint(model) != before
        weight.data.copy_(old)
        assert model_fingerprint(model) == before
        assert checkpoint_fingerprint("some/hub-name") == "some/hub-name"
        (tmp_path / "config.json").write_text("{}")
        first = checkpoint_fingerprint(str(tmp_path))
        (tmp_path / "notes.txt").write_text("x")
        assert checkpoint_fingerprint(str(tmp_path)) == first
        (tmp_path / "config.json").write_text("[]")
        assert checkpoint_fingerprint(str(tmp_path)) != first


def bare_processor(template=None):
    """A processor of a checkpoint without a chat template."""
    tokenizer = types.SimpleNamespace(eos_token="</s>", bos_token="<s>", pad_token=None)
    return types.SimpleNamespace(tokenizer=tokenizer, chat_template=template)


class TestAsking:
    CHAT = (
        {"role": "system", "content": "Be brief."},
        asking.user_message("What?", 1),
        asking.assistant_message("A cat."),
        asking.user_message("Sure?"),
    )

    def test_without_a_template_the_format_is_that_of_llava_15(self):
        text = "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? "
        assert asking.prompt_text(bare_processor(), self.CHAT) == f"{text}ASSISTANT:"
        assert asking.prompt_text(bare_processor(), self.CHAT, ask=False) == text
        with pytest.raises(ValueError, match="the prompt holds half of a character"):
            asking.prompt_text(bare_processor(), [asking.user_message("a \udfff b")])

    def test_a_template_is_used_where_there_is_one(self, demo):
        question = asking.question_prompt(demo[1], "What?", images=2)
        messages = [asking.user_message("What?", 2)]
        assert question == demo[1].apply_chat_template(messages, add_generation_prompt=True)
        assert question.count(asking.image_token(demo[1])) == 2

    def test_the_first_token_is_written_once(self):
        processor = bare_processor()
        assert asking.special_tokens(processor, ["USER: a"])
        assert not asking.special_tokens(processor, ["<s>USER: a", "<s>USER: b"])
        assert asking.special_tokens(processor, ["<s>USER: a", "USER: b"])

    def test_rows_without_padding_token_cannot_be_batched(self):
        with pytest.raises(ValueError, match="no padding token"):
            asking.encoded(bare_processor(), ["a", "b"])

    def test_templates_that_take_text_only_get_text(self):
        """Else they write lists of parts out as Python shows them, or fail."""
        each = "{%% for m in messages %%}{{ m.role }}: {{ %s }} {%% endfor %%}"
        mixed = "m.content[0].text if m.role == 'user' else m.content | trim"
        for shown in ("m.content", "m.content | trim", "m.content.strip()", "'' + m.content"):
            processor = build_processor()
            processor.chat_template = each % shown
            text = asking.question_prompt(processor, "what is it ?", 2)
            assert text == "user: <image>\n<image>\nwhat is it ? "
        processor.chat_template = each % mixed
        chat = [asking.user_message("a b"), asking.assistant_message("c")]
        assert asking.prompt_text(processor, chat) == "user: a b assistant: c "
        for failing, said in (
            ("raise_exception('no system turn')", "cannot write this .no system turn"),
            ("m.content[:0] + ''", "it leaves out what was said"),
            ("m.content + 1", "cannot write this"),
        ):
            processor.chat_template = each % failing
            with pytest.raises(ValueError, match=said):
                asking.prompt_text(processor, chat)

    def test_questions_are_checked(self):
        assert asking.checked_question(" a ", bare_processor()) == "a"
        for question, said in (
            (" ", "empty"),
            ("a <image>", "must not contain '<image>'"),
            ("a \ud83d", r"the question holds half of a character .* after 'a '"),
        ):
            with pytest.raises(ValueError, match=said):
                asking.checked_question(question, bare_processor())

    def test_batches_and_single_questions_get_the_same_right_answers(self, demo):
        model, processor = demo
        samples = load_split("val", 6)
        images = [scene_image(sample.scene_id, "val") for sample in samples]
        texts = [asking.question_prompt(processor, sample.question) for sample in samples]
        batch = asking.encoded(processor, texts, images)
        together = asking.answers(model, processor, batch, max_new_tokens=3)
        alone = [
            asking.answers(
                model, processor, asking.encoded(processor, [text], [image]), max_new_tokens=3
            )[0]
            for text, image in zip(texts, images, strict=True)
        ]
        assert together == alone
        right = [given == sample.answer for given, sample in zip(together, samples, strict=True)]
        assert sum(right) >= 4

    def test_a_batch_is_moved_to_the_models_dtype(self):
        model = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
        moved = asking.on_model(
            model, {"pixel_values": torch.zeros(1), "input_ids": torch.zeros(1, dtype=torch.int64)}
        )
        assert moved["pixel_values"].dtype == torch.bfloat16
        assert moved["input_ids"].dtype == torch.int64

    def test_greedy_unless_told_otherwise(self):
        calls = []
        model = types.SimpleNamespace(
            device=torch.device("cpu"),
            dtype=torch.float32,
            generate=lambda **options: calls.append(options),
        )
        asking.generated(model, {}, max_new_tokens=3)
        asking.generated(model, {}, do_sample=True, temperature=0.5)
        assert calls[0]["do_sample"] is False
        assert calls[0]["temperature"] is None
        assert calls[1] == {"do_sample": True, "temperature": 0.5}


def test_pages_keep_images_and_marks():
    table = tables.Table("T", ["a"], [[tables.Cell("up", False)]])
    figure = tables.Figure(Image.new("RGB", (2, 2)), "cap")
    page = tables.html_report("Title", figures=[figure], tables=[table])
    assert '<span class="bad">✗ up</span>' in page
    assert "data:image/png;base64," in page
    assert page.count("<section") == 2
