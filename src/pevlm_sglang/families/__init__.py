"""One file a model family: its items and token stream → FrameSpans."""
