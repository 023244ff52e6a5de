"""Which of these tests run on the stand-in: every behaviour once.

The stand-in (tests/support/original_llava.py) shows that the contract holds. `make test-llava` runs
all tests on the package itself.
"""

from __future__ import annotations

from pathlib import Path

from original_llava import PACKAGE

HERE = Path(__file__).parent
# Of a test with parameters the first set runs, or the one named here.
CHOSEN = {
    "test_keep_one_is_bit_identical": "mpt",
    "test_identity_grouping_is_the_package_s_own_preparation": "images1-left-mistral",
    "test_identity_grouping_of_tiles_is_the_package_s_own_preparation": "sizes3",
    "test_merged_tiles_are_columns_of_the_unmerged_prompt_in_their_place": "size5-llama",
    "test_tiles_are_merged_to_the_count_that_describe_says": "size5-budget0",
    "test_the_language_model_sees_what_describe_says": "cls_patch-pitome_plus-both",
    "test_cached_greedy_equals_recomputing": "options0-both-mistral",
    "test_text_only": "mpt",
    "test_costs_agree_with_torch": "both-llama",
    "test_a_checkpoint_is_described_without_weights_and_without_the_package": "spatial_unpad",
}
# Every set of parameters is a behaviour of its own.
ALL = {"test_a_checkpoint_that_cannot_be_described_says_why"}
# What models of transformers are tested for in the same way (tests/wrapping).
PACKAGE_ONLY = {
    "test_a_training_step_lowers_the_loss",
    "test_answers_depend_on_words_pixels_and_merging",
    "test_eager_and_sdpa_agree",
    "test_half_precision",
}


def pytest_collection_modifyitems(config, items):
    if PACKAGE:
        return
    kept, left_out, seen = [], [], set()
    for item in items:
        name = _name(item)
        if HERE not in item.path.parents or name in ALL:
            kept.append(item)
        elif name in PACKAGE_ONLY or name in seen or not item.name.endswith(_ending(name)):
            left_out.append(item)
        else:
            seen.add(name)
            kept.append(item)
    lost = {name for name in map(_name, left_out) if name not in seen | PACKAGE_ONLY}
    if lost and not config.option.keyword and "::" not in "".join(config.args):
        raise ValueError(f"no set of parameters is chosen of {', '.join(sorted(lost))}: see CHOSEN")
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _name(item):
    return getattr(item, "originalname", None)


def _ending(name):
    return f"{CHOSEN[name]}]" if name in CHOSEN else ""
