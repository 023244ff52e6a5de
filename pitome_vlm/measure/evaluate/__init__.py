"""Accuracy sweeps: what is measured, where it is stored, how certain it is and how it is shown."""
