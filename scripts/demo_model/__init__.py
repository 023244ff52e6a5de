"""Training code of the bundled demo model; run `scripts/train_demo_model.py`."""
