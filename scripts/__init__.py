"""Measurements and trainings of this repository; run as modules from its root (README.md)."""
