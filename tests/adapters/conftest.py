"""Models that the tests of a module share."""

from __future__ import annotations

import pytest

import pitome_vlm


@pytest.fixture(scope="module")
def built():
    """The models of a module, by what built them."""
    return {}


@pytest.fixture
def shared(built):
    """`shared(build, ...)`: a model that the tests of a module share, unwrapped after each.

    For tests that change neither weights nor configuration and leave no hooks.
    """
    used = []

    def take(build, *arguments, **options):
        key = (build, arguments, *sorted(options.items()))
        if key not in built:
            built[key] = build(*arguments, **options)
        used.append(built[key])
        return built[key]

    yield take
    for model in used:
        pitome_vlm.unwrap(model).eval().zero_grad(set_to_none=True)
