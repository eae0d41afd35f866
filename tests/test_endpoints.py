"""A setting is obeyed or refused, on every endpoint."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pevlm_sglang.endpoints import OBEYED, RefuseDroppedSettings, has_setting

SETTING = {"custom_params": {"pevlm": {"sink_frames": 2}}}


class App:
    """The next application: reads its body and answers 200 with it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(path: str, body: bytes, *, parts: int = 1, method: str = "POST") -> tuple[int, bytes]:
    size = -(-len(body) // parts) or 1
    pieces = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    waiting = [
        {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)}
        for i, piece in enumerate(pieces)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(RefuseDroppedSettings(App())(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/api/chat", "/v9/new"])
@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("nested", [False, True])
def test_refused_where_it_would_be_dropped(path: str, parts: int, nested: bool) -> None:
    """An endpoint that a new SGLang brings is one of these until it is known to obey."""
    body = {"options": [{"deep": SETTING}]} if nested else {"model": "x", **SETTING}
    status, answer = ask(path, json.dumps(body).encode(), parts=parts)
    assert status == 400
    message = json.loads(answer)["message"]
    assert f"got on {path}, which drops it" in message
    assert "/v1/chat/completions" in message


@pytest.mark.parametrize("path", OBEYED)
def test_passed_on_where_it_is_obeyed(path: str) -> None:
    body = json.dumps(SETTING).encode()
    assert ask(path, body) == (200, body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json: custom_params pevlm",
        b'{"custom_params": {"other": "pevlm"}}',
        b'{"custom_params": 1, "text": "pevlm"}',
        b'{"text": "custom_params pevlm"}',
    ],
)
@pytest.mark.parametrize("parts", [1, 5])
def test_everything_else_passes_as_it_came(body: bytes, parts: int) -> None:
    assert ask("/v1/responses", body, parts=parts) == (200, body)


def test_a_body_as_deep_as_its_sender_likes() -> None:
    deep = b'{"a":' * 900 + json.dumps(SETTING).encode() + b"}" * 900
    assert has_setting(deep)


def test_known_paths_are_sglangs_own() -> None:
    """A path that is renamed would be refused, and one mistyped obeyed by nobody."""
    http_server = pytest.importorskip("sglang.srt.entrypoints.http_server")
    paths = {getattr(route, "path", None) for route in http_server.app.routes}
    assert set(OBEYED) <= paths
