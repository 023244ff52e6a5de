"""LoRA with merging on, and the training of the bundled model."""
