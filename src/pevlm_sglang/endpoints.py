"""What a request says is obeyed or refused, on every endpoint of the HTTP server.

SGLang hands ``custom_params`` from some of its endpoints to the scheduler and drops it on the
others, of which a release may have new ones. On those a body with PEVLM's setting gets HTTP 400,
before SGLang sees it. So does a wish for the sampling of a video (``fps``, ``max_frames`` and the
like) in a place that nobody reads, and a video where SGLang would answer without it.
Source: sglang/srt/entrypoints/http_server.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from pevlm_sglang.media.stages import ServerTiming

CHATS = ("/v1/chat/completions", "/invocations")  # SageMaker's form of it
OBEYED = (*CHATS, "/v1/completions", "/generate", "/vertex_generate")
"""Paths on which ``custom_params`` reaches the scheduler."""

WISHES = (
    *("fps", "nframes", "num_frames", "min_frames", "max_frames", "frames"),
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    *("video_config", "mm_process_config", "mm_processor_kwargs"),
)
"""What clients of SGLang, vLLM and the models' own code say about the sampling of a video."""

_LOOKED_AT = re.compile(
    rb'"(?:custom_params|response_format|videos?|video_data|video_url|input_video|%s)"'
    % "|".join(WISHES).encode()
)
"""Bodies without any of these pass unread: a search takes a fifth of the time of a parse."""

_VIDEO_KEYS = ("video_url", "video", "videos", "video_data")
_VIDEO_TYPES = ("video_url", "video", "input_video")

_Send = Callable[[dict[str, Any]], Awaitable[None]]
_Receive = Callable[[], Awaitable[dict[str, Any]]]


def guard_http_server() -> None:
    """Put the check in front of the endpoints of this process's HTTP server, where it has one:
    behind all other middleware, which checks keys and decompresses bodies, and says in each
    response where the time of its media went."""
    if (server := sys.modules.get("sglang.srt.entrypoints.http_server")) is not None:
        server.app.add_middleware(ServerTiming)
        server.app.add_middleware(RefuseDropped)
        server.app.user_middleware.append(server.app.user_middleware.pop(0))


class RefuseDropped:
    """ASGI middleware: HTTP 400 for what the endpoint, ``app``, would drop."""

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
        if (reason := refusal(scope["path"], body)) is not None:
            error = {"object": "error", "message": reason, "type": "BadRequestError", "code": 400}
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
    if _LOOKED_AT.search(body) is None:
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # the endpoint's to refuse
        return None
    if not isinstance(content, dict):
        return None
    if path not in OBEYED and _has_setting(content):
        return (
            f"PEVLM: custom_params['pevlm']: expected on one of {', '.join(OBEYED)}, got on "
            f"{path}, which drops it; ask there, or set the server's default with --pevlm-... flags"
        )
    if path in CHATS:
        form = content.get("response_format")
        if form is not None and not isinstance(form, dict):  # HTTP 500 of SGLang's model
            return f"response_format: expected an object, got {str(form)[:50]!r}"
    for part in _parts(content):
        for url in _each(part.get("video_url")):
            for name in WISHES:  # SGLang's model takes true for 1
                if isinstance(value := url.get(name), bool):
                    kind = "a word" if name == "frames" else "a number"
                    return f"PEVLM: {name}: expected {kind}, got {json.dumps(value)}"
    for place, mapping in _places(path, content):
        for name in WISHES:
            if mapping.get(name) is not None:
                return (
                    f"PEVLM: {name}: expected beside the url of a video (in video_url on "
                    f"{CHATS[0]}, in an entry of video_data on /generate), got in {place} on "
                    f"{path}, where nobody reads it"
                )
    if path not in (*CHATS, "/generate") and path in WITHOUT_VIDEOS and _has_video(content):
        return (
            f"PEVLM: video: expected on one of {', '.join((*CHATS, '/generate'))}, got on {path}, "
            "which drops it"
        )
    return None


WITHOUT_VIDEOS = (
    *("/v1/completions", "/v1/messages", "/vertex_generate"),
    *("/api/chat", "/api/generate"),
)
"""Paths of text that SGLang generates, and of no videos."""


def _places(path: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where a wish is dropped, by name: in the body itself, in what holds parameters, and in the
    parts of a message. A chat's ``video_url`` is checked by SGLang's request model, and the entries
    of ``video_data`` by the processor. Not in tools and schemas, whose names are the user's."""
    yield "the body", content
    for name in ("options", "parameters", "sampling_params", "custom_params", "extra_body"):
        for value in _each(content.get(name)):
            yield name, value
    for value in _each(content.get("instances")):
        yield "instances", value
    for part in _parts(content):
        yield "a message or a part of it", part
        if path not in (*CHATS, "/v1/responses"):
            for name in _VIDEO_KEYS:
                for value in _each(part.get(name)):
                    yield name, value


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of all messages."""
    for name in ("messages", "input"):
        for message in _each(content.get(name)):
            yield message
            yield from _each(message.get("content"))


def _has_video(content: Mapping[str, Any]) -> bool:
    inside = (*_each(content.get("instances")), *_each(content.get("parameters")))
    return any(
        value.get("type") in _VIDEO_TYPES or any(value.get(name) for name in _VIDEO_KEYS)
        for value in (content, *inside, *_parts(content))
    )


def _each(value: Any) -> Iterable[Mapping[str, Any]]:
    """The mappings in a value that may be one of them, or a list."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, dict)]


def _has_setting(content: Any) -> bool:
    """Whether there is ``custom_params`` with ``pevlm`` anywhere."""
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
