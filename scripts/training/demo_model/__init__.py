"""Training code of the bundled demo model; run it with `python -m scripts.training.demo_model`."""
