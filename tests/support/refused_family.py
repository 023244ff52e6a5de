"""What tests of the generic adapter state on releases of transformers that it cannot serve."""

from __future__ import annotations

import pytest
from tiny_families import FAMILIES

import pitome_vlm
from pitome_vlm.releases import takes_features
from pitome_vlm.wrapping.wrap import is_wrapped

SERVED = takes_features(FAMILIES["internvl"].model())


def refused(family):
    """That wrapping is refused in a line, and the model is left alone."""
    model = family.model()
    with pytest.raises(TypeError, match=r"5\.\d\d or later|cannot wrap Lfm2Vl") as found:
        pitome_vlm.wrap(model, keep=0.3)
    assert "\n" not in str(found.value)
    assert not is_wrapped(model)


def else_refused(*names):
    """The test itself; on a release without what it needs, that these families are refused.

    Without names that of the test's own argument `name` is.
    """

    def choose(test):
        if SERVED and all(name in FAMILIES for name in names):
            return test

        def all_are_refused():
            for name in names:
                if name in FAMILIES and not SERVED:
                    refused(FAMILIES[name])

        def is_refused(name):
            if name in FAMILIES:
                refused(FAMILIES[name])

        return all_are_refused if names else is_refused

    return choose
