"""Counting what torch.compile makes, without waiting for a real backend."""

from __future__ import annotations

import pytest
import torch


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _, **options):
        del options
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def no_older_graphs():
    """For every test of a module that imports this."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
