"""One file a model family: its reference."""
