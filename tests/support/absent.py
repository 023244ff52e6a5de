"""Optional dependencies that are not there."""

import importlib.util


def hide(monkeypatch, *modules):
    """Let `find_spec` find none of these modules until the test ends."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in modules else real(name, *a)
    )
