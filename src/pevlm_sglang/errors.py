"""What is refused: a server before it starts, or a request with HTTP 400."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """A setting, model or backend that PEVLM cannot serve; the server is refused with this
    message."""


class FrameSpanError(ValueError):
    """The frames of a request cannot be told apart; the request is refused with this message."""
