"""A setting of a request is obeyed or refused, on every endpoint of the HTTP server.

SGLang hands ``custom_params`` from some of its endpoints to the scheduler and drops it on the
others, of which a release may have new ones. On those a body with PEVLM's setting gets HTTP 400,
before SGLang sees it.
Source: sglang/srt/entrypoints/http_server.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from pevlm_sglang.media.stages import ServerTiming

OBEYED = (
    *("/generate", "/v1/chat/completions", "/v1/completions"),
    *("/invocations", "/vertex_generate"),  # SageMaker's and Vertex's forms of the first two
)
"""Paths on which ``custom_params`` reaches the scheduler."""


_Send = Callable[[dict[str, Any]], Awaitable[None]]
_Receive = Callable[[], Awaitable[dict[str, Any]]]


def guard_http_server() -> None:
    """Put the check in front of the HTTP server of this process, where it has one; and behind it
    what says in each response where the time of its media went."""
    if (server := sys.modules.get("sglang.srt.entrypoints.http_server")) is not None:
        server.app.add_middleware(ServerTiming)
        server.app.add_middleware(RefuseDroppedSettings)


class RefuseDroppedSettings:
    """ASGI middleware: HTTP 400 for a setting that the endpoint, ``app``, would drop."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["method"] == "GET" or scope["path"] in OBEYED:
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        if has_setting(b"".join(message.get("body", b"") for message in messages)):
            message = (
                f"PEVLM: custom_params['pevlm']: expected on one of {', '.join(OBEYED)}, got on "
                f"{scope['path']}, which drops it; ask there, or set the server's default with "
                "--pevlm-... flags"
            )
            error = {"object": "error", "message": message, "type": "BadRequestError", "code": 400}
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(error).encode()})
            return

        async def again() -> dict[str, Any]:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


def has_setting(body: bytes) -> bool:
    """Whether a JSON body has ``custom_params`` with ``pevlm`` anywhere."""
    if b"custom_params" not in body or b"pevlm" not in body:
        return False
    try:
        content = json.loads(body)
    except ValueError:  # the endpoint's to refuse
        return False
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
