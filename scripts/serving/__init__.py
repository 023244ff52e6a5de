"""Load, accuracy and memory of a vLLM server with merging."""
