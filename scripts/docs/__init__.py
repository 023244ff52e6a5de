"""The documentation: its drawings and its site."""
