"""The notebook runs, and its stored outputs are those of a run."""

import nbformat
import pytest

from scripts.docs.notebook import NOTEBOOK, executed, outputs


@pytest.mark.slow
def test_the_notebook_shows_what_it_shows_today():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    shown = outputs(stored)
    assert sum("image" in one for one in shown) == 2
    assert outputs(executed(stored)) == shown, "run `python -m scripts.docs.notebook`"
