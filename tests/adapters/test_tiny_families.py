"""The tiny models of many families are fit to test adapters with."""

import torch
from tiny_families import FAMILIES

ROWS = (1, 2)


def each(check):
    """Run a check for every family and name those that fail."""
    failed = {}
    for name, family in FAMILIES.items():
        try:
            check(family)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def changed(batch, image_rows):
    """The batch with other pixels for its first image."""
    name = next(key for key in batch if key.startswith("pixel_values"))
    values = batch[name].clone()
    place = (0, 0) if values.dim() == 5 and len(values) == image_rows else 0
    values[place] = values[place].flip(-1)
    return batch | {name: values}


def test_the_batches_run_and_answers_depend_on_pixels():
    def check(family):
        model, batch = family()
        plain = logits(model, batch)
        assert plain.isfinite().all()
        new = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert new.shape[1] == batch["input_ids"].shape[1] + 4
        difference = (logits(model, changed(batch, len(ROWS))) - plain).abs()
        own, other = difference[0, -1].max(), difference[1].max()
        assert own > 1e-2, f"the image's own row changes by {own}"
        assert other < 1e-4, f"the other row changes by {other}"

    each(check)


def test_both_padding_sides_give_the_same_logits():
    def check(family):
        model, left = family()
        right = family.batch(side="right")
        at_left = logits(model, left)[left["attention_mask"].bool()]
        at_right = logits(model, right)[right["attention_mask"].bool()]
        assert (at_left - at_right).abs().max() < 1e-3

    each(check)


def test_rows_without_images_run():
    def check(family):
        model = family.model()
        for images in ((0, 1), (0, 0)):
            assert logits(model, family.batch(images)).isfinite().all()

    each(check)


def test_placeholders_are_counted_by_tile():
    def check(family):
        counts = (family.batch()["input_ids"] == family.image_token).sum(dim=1).tolist()
        tokens = family.tokens()
        assert tuple(map(len, tokens)) == ROWS
        assert counts == [sum(map(sum, row)) for row in tokens]
        assert min(min(tiles) for row in tokens for tiles in row) >= 16

    each(check)
