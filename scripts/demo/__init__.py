"""Accuracy of the bundled model: tables of README and eval/results/demo, and the ablation."""
