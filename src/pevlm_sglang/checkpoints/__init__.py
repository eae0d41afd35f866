"""Published checkpoint layouts that transformers does not know."""
