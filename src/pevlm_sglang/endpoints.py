"""What a request says of PEVLM or of its videos is obeyed or refused, on every endpoint of the HTTP
server.

SGLang hands ``custom_params`` from some of its endpoints to the scheduler and drops it on the
others, of which a release may have new ones; and it drops names that its request models do not
have, ``fps`` beside the messages say. A body with such a thing gets HTTP 400, before SGLang sees
it.
Source: sglang/srt/entrypoints/http_server.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any

OBEYED = (
    *("/generate", "/v1/chat/completions", "/v1/completions"),
    *("/invocations", "/vertex_generate"),  # SageMaker's and Vertex's forms of the first two
)
"""Paths on which ``custom_params`` reaches the scheduler."""

CHAT = ("/v1/chat/completions", "/invocations", "/v1/responses")

WISHES = (
    *("fps", "nframes", "num_frames", "min_frames", "max_frames", "sample_fps"),
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
)
"""Names of what a client, here or elsewhere, says of a video's sampling."""

_VIDEOS = ("video_url", "video_data", "videos")
_READ = {
    **dict.fromkeys(CHAT, ("content", "video_url")),
    "/generate": ("", "video_data"),
    "/vertex_generate": ("parameters", "video_data"),
}
"""Where a path takes videos and wishes of them: the field, and the field around it. What is said in
there is checked later, by the request's model (``media/video_url.py``) or with its video
(``media/wishes.py``)."""

_FREE = (
    *("tools", "functions", "tool_choice", "arguments", "metadata", "chat_template_kwargs"),
    *("response_format", "format", "schema", "json_schema", "custom_params", "state"),
    *("image_url", "image_data", "audio_data"),
)
"""Where a client's own names stand, or other media."""

_SAID = re.compile(
    "|".join(
        f'"{name}"' for name in ("custom_params", "response_format", *WISHES, *_VIDEOS)
    ).encode()
)
"""What is looked for before a body, of up to many megabytes, is parsed."""

_Send = Callable[[dict[str, Any]], Awaitable[None]]
_Receive = Callable[[], Awaitable[dict[str, Any]]]


def guard_http_server() -> None:
    """Put the check in front of the HTTP server of this process, where it has one."""
    if (server := sys.modules.get("sglang.srt.entrypoints.http_server")) is not None:
        server.app.add_middleware(RefuseDropped)


class RefuseDropped:
    """ASGI middleware: HTTP 400 for what the endpoint, of ``app``, would drop."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["method"] == "GET":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if (why := refusal(scope["path"], body)) is not None:
            message = f"PEVLM: {why}"
            error = {"object": "error", "message": message, "type": "BadRequestError", "code": 400}
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(error).encode()})
            return
        del body

        async def again() -> dict[str, Any]:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


def refusal(path: str, body: bytes) -> str | None:
    """Why a body is refused on a path; None where it is not."""
    if not _SAID.search(body):
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # the endpoint's to refuse
        return None
    if path not in OBEYED and _has_setting(content):
        return (
            f"custom_params['pevlm']: expected on one of {', '.join(OBEYED)}, got on {path}, which "
            "drops it; ask there, or set the server's default with --pevlm-... flags"
        )
    if (name := _dropped(path, content)) in _VIDEOS:
        return (
            f"{name}: expected a video in video_url of a chat request or in video_data on "
            f"/generate, got one in another place on {path}, which does not read it"
        )
    if name is not None:
        return (
            f"{name}: expected inside video_url of a chat request or inside an entry of video_data "
            f"on /generate, got in another place on {path}, where it is not heeded"
        )
    form = content.get("response_format") if isinstance(content, dict) else None
    if path in CHAT and form and not isinstance(form, dict):  # SGLang's own model answers 500
        return f"response_format: expected an object, got {str(form)[:50]}"
    return None


def _has_setting(content: Any) -> bool:
    """Whether a body has ``custom_params`` with ``pevlm`` anywhere."""
    left = [content]  # no recursion: a body may be nested as deep as its sender likes
    while left:
        value = left.pop()
        if isinstance(value, dict):
            params = value.get("custom_params")
            if isinstance(params, dict) and "pevlm" in params:
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


def _dropped(path: str, content: Any) -> str | None:
    """A wish, or a video, where this path does not read it."""
    left = [("", content)]  # each with the name of the field that it stands in
    while left:
        around, value = left.pop()
        if isinstance(value, list):
            left += ((around, one) for one in value)
        if not isinstance(value, dict):
            continue
        free = (*_FREE, "input") if value.get("type") == "tool_use" else _FREE
        for name, inner in value.items():
            if inner is None or name in free or (around, name) == _READ.get(path):
                continue
            if name in WISHES or name in _VIDEOS:
                return name
            left.append((name, inner))
    return None
