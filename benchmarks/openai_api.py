"""A server's OpenAI API, as the demo and the accuracy gate ask it."""

from __future__ import annotations

from typing import Any

import openai


def connect(url: str) -> openai.OpenAI:
    """A client of a server on this machine: no key, no second try, no proxy of the environment.

    Args:
        url: of the server, without a path.
    """
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


def about(video: dict[str, Any], text: str) -> list[Any]:
    """The messages of a question about one video; the client has no type for ``video_url``.

    Args:
        video: ``url``, and what the request wishes of the sampling (``fps``, ``max_frames``).
    """
    content = [{"type": "video_url", "video_url": video}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]
