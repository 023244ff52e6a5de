"""How sure a loss of quality is: the intervals of `stats.relative_loss`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pitome_vlm.measure.stats import relative_loss


@pytest.mark.parametrize(("images", "lost"), [(30, 0.0), (30, 0.02), (100, 0.03), (60, 0.2)])
def test_the_upper_end_is_rarely_below_the_truth(images, lost):
    """A plain bootstrap fails here: with few losses it misses the truth in up to 80 % of cases."""
    rng, missed, runs, each = np.random.default_rng(3), 0, 100, 3
    groups = np.repeat(np.arange(images), each)
    for _ in range(runs):
        base = rng.random(images * each) < 0.9
        kept = base & (rng.random(images * each) >= lost)
        found = relative_loss(base.astype(float), kept.astype(float), groups)
        assert found.low <= found.value <= found.high
        missed += found.high < lost
    # 2.5 % are allowed; three standard deviations of the count on top.
    assert missed <= runs * 0.025 + 3 * math.sqrt(runs * 0.025)


def test_no_difference_is_not_certainty_and_more_images_say_more():
    ends = []
    for images in (10, 100, 1000):
        found = relative_loss([1.0] * images, [1.0] * images, range(images))
        assert found.value == 0
        assert found.low < 0 < found.high
        ends.append(found.high)
    # Three of n, as the rule of three has it.
    assert ends[1] == pytest.approx(3 / 100, rel=0.35)
    assert ends == sorted(ends, reverse=True)
    agreement = relative_loss([1.0] * 10, [1.0] * 10, range(10), gains=False)
    assert agreement.low == 0 < agreement.high


def test_questions_about_one_image_are_no_independent_evidence():
    lost = [0.0, 0.0, 1.0, 1.0] * 30
    apart = relative_loss([1.0] * 120, lost, range(120))
    together = relative_loss([1.0] * 120, lost, np.repeat(range(30), 4))
    clumped = relative_loss([1.0] * 120, sorted(lost), np.repeat(range(30), 4))
    assert apart.value == together.value == clumped.value == 0.5
    assert together.high - together.low < apart.high - apart.low
    assert clumped.high - clumped.low > 1.3 * (apart.high - apart.low)


def test_loss_is_a_share_of_what_the_unreduced_model_gets_right():
    found = relative_loss([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 2, 2])
    assert found.value == pytest.approx(0.25)
    assert (found.base, found.reduced) == (pytest.approx(4 / 6), pytest.approx(3 / 6))
    with pytest.raises(ValueError, match="no question right"):
        relative_loss([0.0, 0.0], [1.0, 0.0], [0, 1])
