"""What a request says is obeyed or refused, on every endpoint."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pevlm_sglang.endpoints import CHATS, OBEYED, WISHES, RefuseDropped, guard_http_server, refusal

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
    asyncio.run(RefuseDropped(App())(scope, receive, send))
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
    assert "which drops it" in str(refusal("/v1/responses", deep))


VIDEO = {"type": "video_url", "video_url": {"url": "a.mp4"}}
TEXT = {"type": "text", "text": "fps"}


def chat(*parts: Any, name: str = "messages", **more: Any) -> dict[str, Any]:
    return {name: [{"role": "user", "content": [TEXT, *parts]}], **more}


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize(
    ("path", "form"),
    [
        *(
            (path, {})
            for path in (*OBEYED, "/v1/responses", "/v1/messages", "/api/chat", "/v9/new")
        ),
        ("/generate", [{}]),
        ("/generate", "sampling_params"),
        ("/v1/chat/completions", "custom_params"),
        ("/v1/chat/completions", "extra_body"),
        ("/api/generate", "options"),
        ("/vertex_generate", "parameters"),
        ("/vertex_generate", "instances"),
        ("/v1/responses", "input"),
        ("/v1/messages", "messages"),
    ],
)
def test_a_wish_where_it_would_be_dropped(path: str, form: Any, name: str) -> None:
    wish: dict[str, Any] = {name: 2}
    if form == {}:
        body: Any = wish
    elif isinstance(form, list):
        body = {"sampling_params": [{}, wish]}
    elif form in ("input", "messages"):
        body = chat({**VIDEO, **wish}, name=form)
    else:
        body = {form: [wish] if form == "instances" else wish}
    status, answer = ask(path, json.dumps({"model": "x", **body}).encode())
    assert status == 400
    assert f"PEVLM: {name}: expected beside the url of a video" in json.loads(answer)["message"]


@pytest.mark.parametrize("name", WISHES)
def test_wishes_and_names_of_the_user(name: str) -> None:
    """What others check, and what is none of anybody's business."""
    schema = {"parameters": {"type": "object", "properties": {name: {"type": "number"}}}}
    for path, body in (
        ("/v1/chat/completions", chat({"type": "video_url", "video_url": {"url": "a", name: 1}})),
        ("/v1/chat/completions", chat(tools=[{"type": "function", "function": schema}])),
        ("/v1/messages", chat(tools=[{"name": "a", "input_schema": schema}])),
        ("/generate", {"text": name, "video_data": [{"url": "a", name: 1}]}),
        ("/generate", {"text": name, name: None}),
        ("/api/chat", {"format": schema}),
    ):
        assert ask(path, json.dumps(body).encode())[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/vertex_generate", {"instances": [{"text": "a", "video_data": "a.mp4"}]}),
        ("/v1/messages", chat(VIDEO)),
        ("/v1/messages", chat({"type": "video", "source": {"type": "base64", "data": ""}})),
        ("/v1/completions", {"prompt": "a", "video_data": ["a.mp4"]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "videos": ["a"]}]}),
        ("/api/generate", {"prompt": "a", "videos": ["a"]}),
    ],
)
def test_a_video_where_it_would_be_dropped(path: str, body: Any) -> None:
    status, answer = ask(path, json.dumps(body).encode())
    assert status == 400
    assert f"got on {path}, which drops it" in json.loads(answer)["message"]


@pytest.mark.parametrize("path", [*CHATS, "/v1/responses"])
@pytest.mark.parametrize(("value", "written"), [(True, "true"), (False, "false")])
def test_a_number_that_is_none(path: str, value: bool, written: str) -> None:
    part = {"type": "video_url", "video_url": {"url": "a", "max_frames": value}}
    body = chat(part, name="input" if path == "/v1/responses" else "messages")
    status, answer = ask(path, json.dumps(body).encode())
    assert status == 400
    expected = f"PEVLM: max_frames: expected a number, got {written}"
    assert json.loads(answer)["message"] == expected


@pytest.mark.parametrize("path", CHATS)
def test_a_response_format_that_is_none(path: str) -> None:
    for form, expected in (
        (5, 400),
        ("json", 400),
        ([], 400),
        ({"type": "text"}, 200),
        (None, 200),
    ):
        status, answer = ask(path, json.dumps(chat(response_format=form)).encode())
        assert status == expected
        assert status == 200 or b"response_format: expected an object" in answer


def test_the_check_sees_what_the_endpoint_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other middleware decompresses bodies, and may be added later too."""
    applications = pytest.importorskip("starlette.applications")
    app = applications.Starlette()
    app.add_middleware(type("Decompression", (), {}))
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.http_server", SimpleNamespace(app=app))
    guard_http_server()
    app.add_middleware(type("Metrics", (), {}))
    names = [middleware.cls.__name__ for middleware in app.user_middleware]
    assert names == ["Metrics", "Decompression", "RefuseDropped"], "the outermost comes first"


def test_a_long_video_costs_a_search() -> None:
    """Not a parse: it would hold up the server's loop."""
    body = json.dumps({"text": "a" * (16 << 20), "x": 1}).encode()
    began = time.perf_counter()
    assert refusal("/generate", body) is None
    assert time.perf_counter() - began < 0.1


READ = {"GET", "HEAD", "OPTIONS"}
SETTLED = {  # every path that takes a body and makes a model answer, and what becomes of it there
    *OBEYED,
    *("/v1/responses", "/v1/messages", "/api/chat", "/api/generate"),  # no setting
}
NO_ANSWERS = {  # what does not make a model write text, or is about the server
    *("/encode", "/classify", "/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score"),
    *("/v1/decisions", "/v1/systemone", "/v1/audio/transcriptions", "/v1/realtime"),
    *("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", "/v1/messages/count_tokens"),
    *("/v1/responses/{response_id}/cancel", "/abort_request", "/api/show"),
    *("/parse_function_call", "/separate_reasoning", "/open_session", "/close_session"),
    *("/set_internal_state", "/flush_cache", "/add_external_corpus", "/remove_external_corpus"),
    *("/hicache/storage-backend/clear", "/hicache/storage-backend"),
    *("/start_profile", "/stop_profile", "/set_trace_level", "/freeze_gc", "/configure_logging"),
    *("/start_expert_distribution_record", "/stop_expert_distribution_record"),
    *("/dump_expert_distribution_record", "/update_weights_from_disk", "/update_weight_version"),
    *("/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance"),
    *("/init_weights_update_group", "/destroy_weights_update_group"),
    *("/update_weights_from_tensor", "/update_weights_from_distributed"),
    *("/update_weights_from_ipc", "/begin_weight_update", "/end_weight_update"),
    *("/get_weights_by_name", "/weights_checker", "/slow_down", "/pd_role_switch"),
    "/scale_elastic_ep",
    *("/release_memory_occupation", "/resume_memory_occupation"),
    *("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"),
    *("/pause_generation", "/continue_generation"),
}


def test_every_endpoint_is_settled() -> None:
    """One that a new SGLang brings: does ``custom_params`` reach the scheduler, does a video reach
    the model, with its wishes? Say so in endpoints.py, and here."""
    http_server = pytest.importorskip("sglang.srt.entrypoints.http_server")
    paths = {
        route.path
        for given in http_server.app.routes
        for route in getattr(getattr(given, "original_router", given), "routes", [given])
        if getattr(route, "path", "")
        and (not hasattr(route, "methods") or set(route.methods or ()) - READ)
    }
    assert paths <= SETTLED | NO_ANSWERS
    assert paths >= SETTLED, "renamed, they would be refused or obeyed by nobody"
