"""The tiny models of many families are fit to test adapters with."""

from dataclasses import replace

import pytest
import torch
import transformers
from tiny_families import GROUPS
from tiny_family import SPECIAL

ROWS = (1, 2)
OLD = transformers.__version__.startswith("4.")


@pytest.fixture(params=GROUPS)
def each(request):
    """Runs a check for every family of a group and names those that fail."""

    def run(check):
        failed = []
        for name, family in GROUPS[request.param].items():
            try:
                check(family)
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
        assert not failed, "\n".join(failed)

    return run


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def with_other_pixels(family, batch):
    """The batch with the first image, of the first row, mirrored."""
    rows = family.shown()
    inputs = rows[0][0].inputs
    mirrored = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    rows[0][0] = replace(rows[0][0], inputs=mirrored)
    return batch | family.collate(rows)


def test_answers_of_four_tokens_are_words(each):
    def check(family):
        model, batch = family()
        new = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert new.shape[1] == batch["input_ids"].shape[1] + 4
        assert new[:, -4:].max() < SPECIAL

    each(check)


def test_the_batches_run_and_answers_depend_on_pixels(each):
    def check(family):
        model, batch = family()
        plain = logits(model, batch)
        assert plain.isfinite().all()
        difference = (logits(model, with_other_pixels(family, batch)) - plain).abs()
        own, other = difference[0, -1].max(), difference[1].max()
        assert own > 0.05, f"the last logits of the image's own row change by {own}"
        assert other < 1e-4, f"the other row changes by {other}"

    each(check)


def test_both_padding_sides_give_the_same_logits(each):
    def check(family):
        model, left = family()
        if OLD and type(model) is transformers.Lfm2VlForConditionalGeneration:
            return  # The convolutions of transformers 4 read padding: they get no 2-D mask.
        right = family.batch(side="right")
        at_left = logits(model, left)[left["attention_mask"].bool()]
        at_right = logits(model, right)[right["attention_mask"].bool()]
        difference = (at_left - at_right).abs().max()
        assert difference < 1e-3, difference

    each(check)


def test_rows_without_images_run(each):
    def check(family):
        model = family.model()
        for images in ((0, 1), (0, 0)):
            assert logits(model, family.batch(images)).isfinite().all(), images

    each(check)


def test_placeholders_are_counted_by_tile(each):
    def check(family):
        counts = (family.batch()["input_ids"] == family.image_token).sum(dim=1).tolist()
        tokens = family.tokens()
        assert tuple(map(len, tokens)) == ROWS
        assert counts == [sum(map(sum, row)) for row in tokens]
        assert min(min(tiles) for row in tokens for tiles in row) >= 16

    each(check)
