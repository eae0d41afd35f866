"""A setting is obeyed or refused, on every endpoint."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pevlm_sglang.endpoints import CHAT, OBEYED, WISHES, RefuseDropped, refusal
from pevlm_sglang.families import registry
from pevlm_sglang.families.qwen_vl.sizes import VideoSettings
from pevlm_sglang.media.wishes import Wishes

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
    assert "custom_params" in str(refusal("/v1/responses", deep))


@pytest.mark.parametrize("body", [b"[" * 10**5 + b'"fps"', b'{"a":' * 10**5 + b'"fps"'])
def test_a_body_too_deep_to_read_is_sglangs_to_refuse(body: bytes) -> None:
    assert refusal("/v1/responses", body) is None


# --- Wishes of a video ---------------------------------------------------------------------------

VIDEO = {"url": "/a.mp4", "fps": 1}
CHAT_VIDEO = {"messages": [{"role": "user", "content": [{"video_url": VIDEO}]}]}


def because(path: str, content: Any) -> str | None:
    return refusal(path, json.dumps(content).encode())


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("path", ["/v9/new", "/generate", *CHAT, "/v1/completions", "/v1/messages"])
def test_a_wish_beside_everything(path: str, name: str) -> None:
    assert f"{name}: expected inside video_url" in str(because(path, {"prompt": "a", name: 0}))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "video_data": VIDEO}),
        ("/generate", {"text": ["a"], "video_data": [[VIDEO, VIDEO]]}),
        ("/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"video_data": [VIDEO]}}),
        *((path, CHAT_VIDEO) for path in CHAT),
    ],
)
def test_a_wish_where_it_is_read(path: str, body: Any) -> None:
    assert because(path, body) is None


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/messages", CHAT_VIDEO, "video_url"),
        ("/v1/chat/completions", {"video_url": VIDEO}, "video_url"),
        ("/v1/chat/completions", {"messages": [{"content": "a", "fps": 1}]}, "fps"),
        ("/v1/chat/completions", {"messages": [{"content": [{"text": "a", "fps": 1}]}]}, "fps"),
        ("/generate", {"sampling_params": {"fps": 1}}, "fps"),
        ("/generate", {"a": {"video_data": "/a.mp4"}}, "video_data"),
        ("/vertex_generate", {"instances": [{"video_data": "/a.mp4"}]}, "video_data"),
        ("/vertex_generate", {"instances": [{}], "parameters": {"fps": 1}}, "fps"),
        ("/api/chat", {"messages": [{"content": "a", "videos": ["/a.mp4"]}]}, "videos"),
        ("/api/generate", {"prompt": "a", "options": {"nframes": 4}}, "nframes"),
    ],
)
def test_a_wish_or_a_video_where_nobody_reads_it(path: str, body: Any, name: str) -> None:
    assert str(because(path, body)).startswith(f"{name}: expected")


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"function": {"parameters": {"properties": {"fps": {}}}}}]},
        {"response_format": {"json_schema": {"schema": {"properties": {"fps": {}}}}}},
        {"messages": [{"content": [{"type": "tool_use", "input": {"fps": 1}}]}]},
        {"messages": [{"tool_calls": [{"function": {"arguments": {"fps": 1}}}]}]},
        {"messages": [{"content": [{"image_url": {"url": "a", "max_pixels": 9}}]}]},
        {"text": '{"fps": 1}', "fps": None},
    ],
)
def test_a_client_s_own_names_are_its_own(body: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/generate", "/v1/responses"):
        assert because(path, body) is None


def test_every_name_that_a_server_or_a_request_can_say_is_a_wish() -> None:
    names = {name for family in registry.FAMILIES for name in _setting_names(family)}
    assert {*names, *vars(Wishes()), *vars(VideoSettings()), "sample_fps"} == set(WISHES)


def _setting_names(family: Any) -> tuple[str, ...]:
    geometries = family.sizes.PUBLISHED.values()
    return tuple(name for geometry in geometries for name in geometry.setting_names)


@pytest.mark.parametrize("form", ["json", [1], 1, True])
@pytest.mark.parametrize("path", CHAT)
def test_a_response_format_that_is_no_object(path: str, form: Any) -> None:
    assert "response_format: expected an object" in str(because(path, {"response_format": form}))
    assert because(path, {"response_format": {"type": "json_object"}}) is None


# --- SGLang's endpoints --------------------------------------------------------------------------

ELSEWHERE = {
    # Their own names for text and pictures; the guard refuses the rest.
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate"),
    *("/v1/embeddings", "/v1/classify", "/v1/score", "/v1/rerank", "/v1/decisions"),
    *("/encode", "/classify", "/v1/systemone", "/v1/audio/transcriptions"),
    *("/v1/tokenize", "/tokenize", "/v1/detokenize", "/detokenize"),
}
ABOUT_THE_SERVER = {
    *("/api/show", "/v1/responses/{response_id}/cancel", "/abort_request"),
    *("/open_session", "/close_session", "/pause_generation", "/continue_generation"),
    *("/parse_function_call", "/separate_reasoning", "/configure_logging", "/set_internal_state"),
    *("/flush_cache", "/freeze_gc", "/slow_down", "/pd_role_switch", "/set_trace_level"),
    *("/add_external_corpus", "/remove_external_corpus", "/dumper/{method}"),
    *("/hicache/storage-backend", "/hicache/storage-backend/clear"),
    *("/start_profile", "/stop_profile", "/start_expert_distribution_record"),
    *("/stop_expert_distribution_record", "/dump_expert_distribution_record"),
    *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc"),
    *("/update_weights_from_distributed", "/update_weight_version", "/begin_weight_update"),
    *("/end_weight_update", "/init_weights_update_group", "/destroy_weights_update_group"),
    *("/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance"),
    *("/get_weights_by_name", "/weights_checker", "/release_memory_occupation"),
    *("/resume_memory_occupation", "/load_lora_adapter", "/load_lora_adapter_from_tensors"),
    *("/unload_lora_adapter", "/scale_elastic_ep"),
}


@pytest.fixture(scope="module")
def paths() -> set[str]:
    """Of SGLang's HTTP server, those that take a body."""
    http_server = pytest.importorskip("sglang.srt.entrypoints.http_server")
    found = http_server.app.openapi()["paths"]
    hidden = {"/tokenize", "/detokenize"}  # other names of two, which the schema leaves out
    return hidden | {path for path, methods in found.items() if {*methods} - {"get", "head"}}


def test_known_paths_are_sglangs_own(paths: set[str]) -> None:
    """A path that is renamed would be refused, and one mistyped obeyed by nobody."""
    assert {*OBEYED, *CHAT} <= paths


def test_no_path_is_new(paths: set[str]) -> None:
    """Whoever finds one here: does it hand ``custom_params`` and videos on? The guard refuses both
    until it stands in ``endpoints.py``."""
    unknown = paths - {*OBEYED, *CHAT, *ELSEWHERE, *ABOUT_THE_SERVER}
    assert not unknown
