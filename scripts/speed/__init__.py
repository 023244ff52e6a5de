"""Time and memory: one plan, one tower, other algorithms, video, a whole GPU."""
