"""`tune`: what the search finds, and what is reported of it."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning import BUDGETS, RECIPES, TOKENS, StubAsker, by_tokens, split_of, stub_rows, tuned

from pitome_vlm.measure.tune import Plan, Recipe
from pitome_vlm.measure.tune.asking import UNREDUCED
from pitome_vlm.measure.tune.search import admissible, walk_down
from pitome_vlm.measure.tune.split import image_groups, split_by_image
from pitome_vlm.measure.tune.tuner import run
from pitome_vlm.merge.config import MergeConfig

# --- what the search finds


def test_the_smallest_budget_within_the_target_is_found_and_reported():
    share = by_tokens(pitome={36: 0.0, 18: 0.5, 9: 0.9}, tome={72: 0.0, 36: 0.0, 18: 0.0, 9: 0.5})
    _, result = tuned(share)
    assert (result.config.algorithm, result.config.tokens) == ("tome", 18)
    assert result.tokens == 18
    assert result.loss.value == 0
    assert result.verdict == "not_shown"  # 200 questions without a difference do not prove 1 %
    _, generous = tuned(share, plan=Plan(max_loss=0.05, recipes=RECIPES, budgets=BUDGETS))
    assert generous.verdict == "met"
    assert generous.config == result.config


def test_at_equal_budgets_the_lower_loss_wins_and_then_the_lower_divergence():
    share = by_tokens(pitome={36: 0.05, 18: 1, 9: 1}, tome={36: 0.01, 18: 1, 9: 1})
    plan = Plan(max_loss=0.1, recipes=RECIPES, budgets=BUDGETS)
    assert tuned(share, plan=plan)[1].config.algorithm == "tome"
    # Both answer everything right; only pitome's distribution moves.
    equal = by_tokens(pitome={18: 1, 9: 1}, tome={18: 1, 9: 1})

    class Moving(StubAsker):
        def ask(self, config, rows, reference, advance):
            replies = super().ask(config, rows, reference, advance)
            if reference is None:
                return replies
            moved = 0.1 if config.algorithm == "pitome" else 0.01
            return dataclasses.replace(replies, divergence=[moved] * len(rows))

    rows, digests = stub_rows()
    result = run(Moving(rows, equal), rows, digests, plan)
    assert (result.config.algorithm, result.config.tokens) == ("tome", 36)


CELL = run(
    StubAsker(stub_rows(8)[0], by_tokens()), *stub_rows(8), Plan(recipes=RECIPES[:1], budgets=[9])
).cells[0]


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(
        st.lists(st.integers(0, 12), min_size=5, max_size=5).map(sorted), min_size=1, max_size=4
    ),
    width=st.integers(0, 6),
    target=st.integers(0, 12),
)
def test_where_quality_falls_with_the_budget_the_walk_finds_what_all_cells_would(
    losses, width, target
):
    recipes = [Recipe(f"r{i}") for i in range(len(losses))]
    measured = []

    def cell(recipe, tokens):
        value = losses[int(recipe.name[1:])][BUDGETS.index(tokens)] / 100
        loss = dataclasses.replace(CELL.loss, value=value, low=value - width / 100, high=value)
        return dataclasses.replace(CELL, recipe=recipe, tokens=tokens, loss=loss, divergence=value)

    def measure(recipe, tokens):
        measured.append((recipe, tokens))
        return cell(recipe, tokens)

    walked = walk_down(recipes, BUDGETS, measure, max_loss=target / 100, spare=2)
    everything = [cell(recipe, tokens) for recipe in recipes for tokens in BUDGETS]
    found, best = (admissible(cells, target / 100)[:1] for cells in (walked, everything))
    assert [(c.tokens, c.loss.value) for c in found] == [(c.tokens, c.loss.value) for c in best]
    assert len(measured) == len(set(measured))


def test_one_violation_that_may_be_chance_does_not_stop_a_walk():
    # 36 tokens miss the target by little, 18 keep everything.
    share = by_tokens(pitome={36: 0.02, 9: 1})
    plan = Plan(recipes=RECIPES[:1], budgets=BUDGETS)
    _, result = tuned(share, plan=plan)
    assert result.config.tokens == 18
    # A loss beyond doubt does.
    _, result = tuned(by_tokens(pitome={36: 0.5, 9: 1}), plan=plan)
    assert result.config.tokens == 72
    assert {cell.tokens for cell in result.cells} == {108, 72, 36}


def test_later_recipes_skip_budgets_that_cannot_matter():
    plan = Plan(recipes=RECIPES, budgets=BUDGETS, max_checks=1)
    _, result = tuned(by_tokens(pitome={9: 1}, tome={9: 1}), plan=plan)
    assert [c.tokens for c in result.cells if c.recipe.name == "tome"] == [18, 9]


def test_without_any_setting_within_the_target_all_tokens_are_kept(tmp_path):
    share = by_tokens(pitome=dict.fromkeys(BUDGETS, 0.5), tome=dict.fromkeys(BUDGETS, 0.3))
    _, result = tuned(share)
    assert result.verdict == "unreduced"
    assert result.config == MergeConfig(keep=1.0, algorithm="none")
    assert result.tokens == TOKENS
    assert not result.checks
    assert "No setting is within the target of at most 1.0 %" in result.statement
    assert "tome at 108 tokens" in result.statement
    result.save(tmp_path, plot=False)
    assert MergeConfig.from_pretrained(tmp_path) == result.config


def test_a_budget_the_model_cannot_have_ends_a_walk_and_is_said():
    _, result = tuned(by_tokens(), smallest=36)
    assert result.config.tokens == 36
    assert result.skipped.keys() == {"pitome", "tome"}
    assert "from 18 tokens on: the smallest count is 36" in result.report()
    with pytest.raises(ValueError, match=r"recipe 'pitome': from 108 tokens on: the smallest"):
        tuned(by_tokens(), smallest=120)


# --- what is reported is not what was searched


def test_the_reported_loss_is_of_the_check_rows_only():
    rows = stub_rows()
    parts = split_of(rows)

    def share(config, row):
        return 0.03 if config.tokens == 36 and row in parts.check else 0.0

    plan = Plan(max_loss=0.1, recipes=RECIPES[:1], budgets=[36])
    asker, result = tuned(share, rows=rows, plan=plan)
    lost = sum(asker.wrong(result.config, row) for row in parts.check)
    assert lost > 0
    assert result.loss.value == pytest.approx(lost / len(parts.check))
    assert result.cells[0].loss.value == 0
    assert result.loss.questions == len(parts.check)
    for config, asked in asker.asked:
        assert set(asked) in (set(parts.search), set(parts.check)), config
    searched = [config for config, asked in asker.asked if set(asked) == set(parts.search)]
    checked = [config for config, asked in asker.asked if set(asked) == set(parts.check)]
    # Nothing is looked at on the check part before the search is over.
    assert asker.asked[: len(searched)] == [(c, parts.search) for c in searched]
    assert checked == [UNREDUCED, result.config]


def test_a_check_that_fails_steps_up_with_a_wider_interval_and_says_so():
    rows = stub_rows()
    parts = split_of(rows)

    def share(config, row):
        return 0.2 if row in parts.check and config.tokens in (9, 18) else 0.0

    plan = Plan(max_loss=0.05, recipes=RECIPES[:1], budgets=BUDGETS)
    _, result = tuned(share, rows=rows, plan=plan)
    assert [cell.tokens for cell in result.checks] == [9, 18, 36]
    assert [cell.loss.level for cell in result.checks] == pytest.approx([0.95, 0.975, 1 - 0.05 / 3])
    assert result.config.tokens == 36
    assert result.verdict == "met"
    assert "98.3 % interval" in result.statement
    assert "(missed by the 2 smaller budgets checked before) is met." in result.statement
    assert result.report().count("missed") >= 2


def test_when_every_check_fails_nothing_is_reduced():
    rows = stub_rows()
    parts = split_of(rows)
    plan = Plan(recipes=RECIPES[:1], budgets=BUDGETS, max_checks=2)
    _, result = tuned(lambda c, row: 0.2 * (row in parts.check), rows=rows, plan=plan)
    assert [cell.tokens for cell in result.checks] == [9, 18]
    assert result.verdict == "unreduced"
    assert result.config.keep == 1.0
    assert result.loss is None
    assert "every setting that was checked misses the target" in result.statement


def test_the_statement_says_met_or_not_shown_by_the_end_of_the_interval():
    rows = stub_rows(2400)
    parts = split_of(rows)
    plan = Plan(max_loss=0.01, recipes=RECIPES[:1], budgets=[36])
    _, met = tuned(by_tokens(), rows=rows, plan=plan)
    assert met.loss.high <= 0.01
    assert met.statement == (
        "On 1200 held-out questions about 600 images the loss of accuracy is 0.0 % (95 % interval "
        f"{100 * met.loss.low:.1f} to {100 * met.loss.high:.1f} %): the target of at most 1.0 % is "
        "met."
    )
    # As many are lost on both parts, within the target.
    hard = {row for part in (parts.search, parts.check) for row in part[:7]}
    _, open_ = tuned(lambda c, row: float(row in hard), rows=rows, plan=plan)
    assert open_.verdict == "not_shown"
    assert open_.loss.value <= 0.01 < open_.loss.high
    assert (
        f"is not shown to be met: the interval reaches {100 * open_.loss.high:.1f} %."
        in open_.statement
    )
    (images,) = re.findall(r"about (\d+) images to check on would be needed", open_.statement)
    assert 600 < int(images) < 3000
    nearly = {row for part in (parts.search, parts.check) for row in part[:12]}
    _, at_target = tuned(lambda c, row: float(row in nearly), rows=rows, plan=plan)
    assert at_target.verdict == "not_shown"
    assert "too close to the target" in at_target.statement


# --- the split


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 25).map(str), min_size=1, max_size=3), min_size=4, max_size=50
    ),
    st.integers(0, 5),
    st.floats(0.1, 0.9),
)
def test_no_image_is_in_both_parts(digests, seed, share):
    if len(set(image_groups(digests))) < 4:
        with pytest.raises(ValueError, match="at least 4 different images are needed"):
            split_by_image(digests, seed=seed, check_share=share)
        return
    parts = split_by_image(digests, seed=seed, check_share=share)
    shown = [
        {name for row in part for name in digests[row]} for part in (parts.search, parts.check)
    ]
    assert not shown[0] & shown[1]
    assert sorted(parts.search + parts.check) == list(range(len(digests)))
    assert parts == split_by_image(digests, seed=seed, check_share=share)
    for part in (parts.search, parts.check):
        assert parts.images(part) >= 2


def test_the_seed_decides_the_split():
    digests = [(str(i),) for i in range(40)]
    splits = {split_by_image(digests, seed=seed).check for seed in range(5)}
    assert len(splits) == 5
    assert {len(check) for check in splits} == {20}


def test_too_little_data_is_refused_and_little_data_is_said():
    with pytest.raises(ValueError, match=r"at least 4 different images.*got 3"):
        tuned(by_tokens(), rows=stub_rows(12, per_image=4))
    _, result = tuned(by_tokens(), rows=stub_rows(20, per_image=2))
    assert any("has 5 images; with fewer than 20" in note for note in result.notes)
    assert any("one of the 10 questions" in note for note in result.notes)
    assert all(note in result.report() for note in result.notes)
    assert not tuned(by_tokens())[1].notes


def test_a_model_that_knows_nothing_is_refused_and_one_that_knows_little_is_named():
    with pytest.raises(
        ValueError, match="answers none of the 200 questions of the search part right"
    ):
        tuned(by_tokens(), rows=stub_rows(answers=("maybe",)))
    rows, digests = stub_rows(400)
    rows = [
        dataclasses.replace(r, answers=("yes" if i % 24 == 0 else "x",)) for i, r in enumerate(rows)
    ]
    _, result = tuned(by_tokens(), rows=(rows, digests))
    assert any("% of the search part right; check the prompt" in note for note in result.notes)


# --- without answers, and other scores


def test_without_answers_the_loss_is_disagreement_with_the_unreduced_model():
    rows = stub_rows(answers=())
    plan = Plan(max_loss=0.1, recipes=RECIPES[:1], budgets=BUDGETS)
    asker, result = tuned(by_tokens(pitome={18: 0.05, 9: 0.6}), rows=rows, plan=plan)
    parts = split_of(rows)
    wrong = sum(asker.wrong(result.config, row) for row in parts.check)
    assert not result.answered
    assert result.config.tokens == 18
    assert result.loss.value == pytest.approx(wrong / len(parts.check))
    assert result.loss.base == 1
    assert result.loss.low >= 0
    assert "loss of agreement with the unreduced model" in result.statement
    assert "nobody said whether those are right" in result.report()


def test_answers_to_some_questions_only_are_an_error_that_names_both():
    rows, digests = stub_rows()
    rows[7] = dataclasses.replace(rows[7], answers=())
    with pytest.raises(ValueError, match="row 7 has no answer but row 0 has"):
        tuned(by_tokens(), rows=(rows, digests))


def test_a_scorer_of_ones_own_counts_and_is_checked():
    seen = []

    def lenient(given, answers):
        seen.append((given, tuple(answers)))
        return 1.0 if given == "yes" else 0.75

    plan = Plan(max_loss=0.2, recipes=RECIPES[:1], budgets=[9], scorer=lenient)
    asker, result = tuned(by_tokens(pitome={9: 0.4}), plan=plan)
    wrong = sum(asker.wrong(result.config, row) for row in split_of(stub_rows()).check)
    assert result.loss.value == pytest.approx(0.25 * wrong / 200)
    assert ("no", ("yes",)) in seen
    assert "lenient" in result.report()
    with pytest.raises(ValueError, match=r"scorer must return a number in \[0, 1\], got 7"):
        tuned(by_tokens(), plan=dataclasses.replace(plan, scorer=lambda given, answers: 7))
