"""Encoders on their own: retrieval and classification."""
