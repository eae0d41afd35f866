"""Bad input costs one clear 4xx, and nothing else: the server answers the next request."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pevlm_sglang.media.stages import SCHEDULER, STAGES
from server.conftest import FEW_TOKENS
from support.server import Server
from support.video import video_data_url

pytestmark = pytest.mark.server

KINDS = ("sparse", "dense")
QUESTION = {"type": "text", "text": "What happens in the video?"}


@pytest.fixture(scope="module")
def server(model: Callable[[str], Path]) -> Iterator[Server]:
    small = ("--context-length", "2048", "--pevlm-sink-frames", "4", "--pevlm-block-frames", "4")
    flags = ("--attention-backend", "pevlm", "--enable-metrics", *FEW_TOKENS, *small)
    with Server(model("qwen2_5_vl"), *flags) as server:
        yield server


@pytest.fixture
def ask(server: Server, clip: Callable[..., Path]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Send a message; afterwards the server must answer an ordinary one."""

    def send(*parts: dict[str, Any], **body: Any) -> tuple[int, str]:
        message = {"role": "user", "content": [*parts, QUESTION]}
        response = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [message], "max_tokens": 2, "temperature": 0, **body},
        )
        return response.status_code, response.text

    yield send
    status, answer = send(_video(video_data_url(clip(10))))
    assert status == 200, answer


def _video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def _data_url(content: bytes, directory: Path) -> str:
    path = directory / "broken.mp4"
    path.write_bytes(content)
    return video_data_url(path)


@pytest.mark.parametrize("kind", ["corrupt", "empty", "no frames", "missing file"])
def test_broken_video(
    kind: str, ask: Callable[..., tuple[int, str]], clip: Callable[..., Path], tmp_path: Path
) -> None:
    if kind == "corrupt":
        url = _data_url(clip(10).read_bytes()[:3000] + bytes(3000), tmp_path)
    elif kind == "empty":
        url = _data_url(b"", tmp_path)
    elif kind == "no frames":
        url = video_data_url(_sound_only(tmp_path / "sound.mp4"))
    else:
        url = "/nowhere/video.mp4"
    status, answer = ask(_video(url))
    assert status == 400
    assert "VIDEO data at index 0" in answer


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": "fast"}, "fps"),
        ({"max_frames": -1}, "max_frames"),
        ({"max_frames": 1}, "max_frames: expected at least 2 sampled frames, got 1"),
        ({"max_frames": True}, "max_frames: expected a number, got true"),
        ({"max_frames": 769}, "max_frames: expected at most 768, the server's limit, got 769"),
        ({"max_pixels": "many"}, "max_pixels"),
        ({"max_pixels": 0}, "max_pixels: expected a whole number of more than 0, got 0"),
        ({"max_pixels": 3000}, "max_pixels: expected at least min_pixels, 3136 here, got 3000"),
        ({"max_pixels": 10**9}, "max_pixels: expected at most 602112, the server's limit"),
        ({"frames": "all"}, "frames: expected 'keyframes', got 'all'"),
        ({"frames": True}, "frames: expected a word, got true"),
        ({"max_image_tokens": 64}, "video max_image_tokens: expected one of fps, max_frames"),
        ({"max_tokens_per_frame": 64}, "video max_tokens_per_frame: expected one of fps"),
        ({"max_dynamic_patch": 2}, "max_dynamic_patch: expected none, this model cuts no picture"),
        ({"min_dynamic_patch": 2}, "min_dynamic_patch"),
        ({"max_long_side_pixel": 64}, "max_long_side_pixel"),
    ],
)
def test_bad_knob_of_a_video(
    settings: dict[str, Any],
    reason: str,
    ask: Callable[..., tuple[int, str]],
    clip: Callable[..., Path],
) -> None:
    url = {"url": video_data_url(clip(10)), **settings}
    status, answer = ask({"type": "video_url", "video_url": url})
    assert status == 400
    assert reason in answer


@pytest.mark.parametrize("name", ["nframes", "min_frames", "min_pixels", "resized_height"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_wish_that_nobody_reads(
    name: str,
    beside: bool,
    ask: Callable[..., tuple[int, str]],
    clip: Callable[..., Path],
) -> None:
    """Dropped, it would be another video than the one asked for."""
    part: dict[str, Any] = {"type": "video_url", "video_url": {"url": video_data_url(clip(10))}}
    (part if beside else part["video_url"])[name] = 8
    status, answer = ask(part)
    assert status == 400
    assert name in answer


@pytest.mark.parametrize("beside", ["fps", "max_frames", "max_pixels", "frames"])
def test_a_wish_beside_its_part(
    beside: str, ask: Callable[..., tuple[int, str]], clip: Callable[..., Path]
) -> None:
    status, answer = ask({**_video(video_data_url(clip(10))), beside: 8})
    assert status == 400
    assert beside in answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi", "max_output_tokens": 1}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/api/generate", {"prompt": "hi", "options": {"num_predict": 1}}),
    ],
)
def test_a_setting_where_it_would_be_dropped(server: Server, path: str, body: Any) -> None:
    body = {"model": "default", "stream": False, **body}
    for setting in ({"enabled": False}, {"enabld": True}):
        reply = server.post(path, {**body, "custom_params": {"pevlm": setting}})
        assert reply.status_code == 400
        assert f"got on {path}, which drops it" in reply.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi", "max_tokens": 1}),
        ("/invocations", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
    ],
)
def test_a_setting_where_it_is_obeyed(server: Server, path: str, body: Any) -> None:
    body = {"model": "default", **body}
    good = {**body, "custom_params": {"pevlm": {"enabled": False}}}
    assert server.post(path, good).status_code == 200
    bad = server.post(path, {**body, "custom_params": {"pevlm": {"enabld": True}}})
    assert bad.status_code == 400
    assert "unknown option 'enabld'" in bad.text


@pytest.mark.parametrize("wish", ["fps", "nframes", "min_frames", "max_frames", "max_pixels"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 1}),
        ("/generate", {"text": "hi"}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 1}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
        ("/api/generate", {"prompt": "hi"}),
        ("/vertex_generate", {"instances": [{"text": "hi"}]}),
    ],
)
def test_a_wish_where_it_would_be_dropped(server: Server, path: str, body: Any, wish: str) -> None:
    reply = server.post(path, {"model": "default", **body, wish: 8})
    assert reply.status_code == 400
    assert f"{wish}: expected beside the url of a video" in reply.text


def test_a_video_on_responses(
    server: Server, model: Callable[[str], Path], clip: Callable[..., Path]
) -> None:
    """It reaches the model with its wishes; or names them."""

    def ask(**wishes: Any) -> Any:
        url = {"url": video_data_url(clip(10)), **wishes}
        parts = [{"type": "video_url", "video_url": url}, {"type": "input_text", "text": "What?"}]
        body = {"model": str(model("qwen2_5_vl")), "max_output_tokens": 2, "store": False}
        message = {"role": "user", "content": parts}
        return server.post("/v1/responses", {**body, "input": [message]})

    full, half = ask(), ask(max_frames=8)
    assert (full.status_code, half.status_code) == (200, 200), (full.text, half.text)
    fewer = full.json()["usage"]["input_tokens"] - half.json()["usage"]["input_tokens"]
    assert fewer == 12 * (10 - 4)
    for wishes in ({"nframes": 8}, {"max_frames": 769}, {"max_frames": True}):
        reply = ask(**wishes)
        assert reply.status_code == 400, reply.text
        assert next(iter(wishes)) in reply.text


@pytest.mark.parametrize(
    ("wishes", "reason"),
    [
        ({"nframes": 8}, "nframes"),
        ({"min_frames": 8}, "video min_frames: expected one of fps, max_frames, max_pixels"),
        ({"num_frames": 8}, "num_frames"),
        ({"min_pixels": 8}, "min_pixels"),
        ({"max_frames": 769}, "max_frames: expected at most 768"),
        ({"max_frames": True}, "boolean"),
        ({"format": "processor_output"}, "format"),
    ],
)
@pytest.mark.parametrize("batch", [False, True])
def test_mappings_on_generate(
    server: Server, clip: Callable[..., Path], batch: bool, wishes: Any, reason: str
) -> None:
    prompt = "<|vision_start|><|video_pad|><|vision_end|>What?"
    good, bad = [{"url": str(clip(10)), "max_frames": 8}], [{"url": str(clip(10)), **wishes}]
    params = {"max_new_tokens": 1}

    def ask(video: Any) -> Any:
        body = {"text": prompt, "video_data": video, "sampling_params": params}
        if batch:
            body |= {"text": [prompt] * 2, "video_data": [good, video]}
        return server.post("/generate", body)

    assert ask(good).status_code == 200
    reply = ask(bad)
    assert reply.status_code == 400
    assert reason in reply.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations"])
@pytest.mark.parametrize("form", [5, "json", []])
def test_a_response_format_that_is_none(server: Server, path: str, form: Any) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    reply = server.post(path, {**body, "response_format": form})
    assert reply.status_code == 400
    assert "response_format: expected an object" in reply.text


def test_vertex_drops_no_video(server: Server, clip: Callable[..., Path]) -> None:
    body = {"instances": [{"text": "hi", "video_data": str(clip(10))}]}
    reply = server.post("/vertex_generate", body)
    assert reply.status_code == 400
    assert "video: expected on one of" in reply.text


def test_vertex_obeys(server: Server) -> None:
    for setting, status in (({"enabled": False}, 200), ({"enabld": True}, 400)):
        params = {"max_new_tokens": 1, "custom_params": {"pevlm": setting}}
        body = {"instances": [{"text": "hi"}], "parameters": {"sampling_params": params}}
        assert server.post("/vertex_generate", body).status_code == status


def test_one_frame(ask: Callable[..., tuple[int, str]], clip: Callable[..., Path]) -> None:
    status, answer = ask(_video(video_data_url(clip(0.25))))
    assert status == 400
    assert "expected at least 2 frames" in answer
    assert "send a single frame as an image" in answer


def test_longer_than_the_context(
    ask: Callable[..., tuple[int, str]], clip: Callable[..., Path]
) -> None:
    status, answer = ask(_video(video_data_url(clip(200))))
    assert status == 400
    assert "videos and images: expected fewer than 2" in answer
    assert "ask for fewer frames or pixels" in answer


def test_a_hundred_videos(ask: Callable[..., tuple[int, str]], clip: Callable[..., Path]) -> None:
    """No bad input, only much of it."""
    status, answer = ask(*[_video(video_data_url(clip(0.5)))] * 100)
    assert status == 200, answer


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ({"sink_frames": -1}, "sink_frames: expected >= 0, got -1"),
        ({"block_frames": 0}, "block_frames: expected >= 1, got 0"),
        ({"sink_frames": "NaN"}, "sink_frames: expected int, got 'NaN'"),
        ({"sink_frames": 1e300}, "sink_frames: expected int, got 1e+300"),
        ({"enabled": 1}, "enabled: expected bool, got 1"),
        ({"sinks": 2}, "valid options: enabled, sink_frames, block_frames, image_runs"),
        ({"base_backend": "triton"}, "unknown option 'base_backend'"),
        ({f"key{i}": i for i in range(50_000)}, "and 49997 more"),
        ([1, 2], "expected a mapping"),
    ],
)
@pytest.mark.parametrize("with_video", [True, False])
def test_bad_override(
    override: Any,
    reason: str,
    with_video: bool,
    ask: Callable[..., tuple[int, str]],
    clip: Callable[..., Path],
) -> None:
    parts = [_video(video_data_url(clip(10)))] if with_video else []
    status, answer = ask(*parts, custom_params={"pevlm": override})
    assert status == 400
    assert "PEVLM: custom_params['pevlm']: " in answer
    assert reason in answer
    assert len(answer) < 1000


def test_not_a_number_in_the_body(server: Server) -> None:
    body = (
        '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}],'
        ' "custom_params": {"pevlm": {"sink_frames": NaN}}}'
    )
    response = server.post_text("/v1/chat/completions", body)
    assert response.status_code == 400
    assert server.alive()


def test_bad_override_with_prompt_logprobs(server: Server) -> None:
    """The reason survives what SGLang checks after PEVLM did."""
    response = server.post(
        "/generate",
        {
            "text": "a b c d e f",
            "return_logprob": True,
            "logprob_start_len": 3,
            "sampling_params": {"max_new_tokens": 1, "custom_params": {"pevlm": {"x": 1}}},
        },
    )
    assert response.status_code == 400
    assert "unknown option 'x'" in response.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/generate", {"session_params": {"id": {}}}),
        ("/generate", {"positional_embed_overrides": ["a"]}),
        ("/generate", {"return_hidden_states": [True]}),
        ("/generate", {"sampling_params": [{}]}),
        ("/generate", {"return_logprob": True, "top_logprobs_num": 10**9}),
        ("/generate", {"text": None, "input_ids": [-1]}),
        ("/v1/chat/completions", {"input_ids": [10**6]}),
        ("/v1/chat/completions", {"n": 10**6}),
    ],
)
def test_what_sglang_does_not_survive(server: Server, path: str, fields: dict[str, Any]) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    body = {"text": "a"} if path == "/generate" else chat
    answer = server.post(path, {**body, **fields})
    assert answer.status_code == 400, answer.text
    assert server.post(path, body).status_code == 200


def test_counters(server: Server, clip: Callable[..., Path]) -> None:
    """``/metrics`` and ``/server_info`` count the same, and count this request."""
    server.post("/flush_cache")
    before = _counters(server)
    answer = server.chat(
        [_video(video_data_url(clip(10, seed=9))), QUESTION],
        max_tokens=2,
        custom_params={"pevlm": {"sink_frames": 2, "block_frames": 2}},
    )
    tokens = answer["usage"]["prompt_tokens"]
    grown = {name: value - before.get(name, 0) for name, value in _counters(server).items()}
    assert grown['pevlm_prefill_tokens_total{kind="sparse",reason=""}'] == 8 * 12  # 2nd block on
    dense = 'pevlm_prefill_tokens_total{kind="dense",reason="global_token"}'
    assert grown[dense] == tokens - 8 * 12
    computed = grown['pevlm_attention_pairs_total{kind="computed"}']
    saved = grown['pevlm_attention_pairs_total{kind="saved"}']
    assert computed + saved == tokens * (tokens + 1) / 2
    assert saved > 0
    totals = server.info()["internal_states"][0]["pevlm"]
    assert (
        totals["sparse_tokens"]
        == _counters(server)['pevlm_prefill_tokens_total{kind="sparse",reason=""}']
    )
    assert f"#sparse-token: {8 * 12}, #block: 8, visible_fraction: " in server.log()


def test_where_the_time_of_a_video_went(server: Server, clip: Callable[..., Path]) -> None:
    """In the response, the metrics and the log; of text, nothing."""
    path = clip(10, seed=11)
    message = {"role": "user", "content": [_video(str(path)), QUESTION]}
    before = _counters(server)
    began = time.perf_counter()
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": [message]})
    seconds = time.perf_counter() - began
    stages = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
    assert list(stages) == [name for name in (*STAGES, *SCHEDULER) if name in stages]
    assert {"fetch", "decode", "process", "hash", "transfer", *SCHEDULER} <= {*stages}
    scheduler = {name: float(stages.pop(name)) / 1000 for name in SCHEDULER}
    assert 0 < scheduler["prefill"] < seconds
    assert 0 < scheduler["queue"] < seconds
    assert all(float(milliseconds) >= 0 for milliseconds in stages.values())
    grown = {name: value - before.get(name, 0) for name, value in _counters(server).items()}
    assert grown["pevlm_media_frames_total"] == 20
    assert grown["pevlm_media_bytes_total"] == path.stat().st_size
    assert grown["pevlm_vision_seconds_count"] == grown["pevlm_vision_runs_total"] == 1
    assert grown['pevlm_prefill_seconds_count{kind="sparse"}'] == 1
    forwards = [grown.get(f'pevlm_prefill_seconds_sum{{kind="{k}"}}', 0) for k in KINDS]
    of_device = grown["pevlm_vision_seconds_sum"] + sum(forwards)
    assert 0 < of_device <= scheduler["prefill"] + 0.01
    for stage, milliseconds in stages.items():
        assert grown[f'pevlm_media_seconds_count{{stage="{stage}"}}'] == 1
        seconds = grown[f'pevlm_media_seconds_sum{{stage="{stage}"}}']
        assert seconds == pytest.approx(float(milliseconds) / 1000, abs=1e-3)
    assert f"PEVLM media, #frame: 20, #byte: {path.stat().st_size}, fetch " in server.log()
    assert re.search(r"PEVLM first token, fetch .*, queue [\d.]+ s, prefill [\d.]+ s", server.log())
    text = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert "server-timing" not in server.post("/v1/chat/completions", text).headers


def _counters(server: Server) -> dict[str, float]:
    lines = [line for line in server.metrics().splitlines() if line.startswith("pevlm_")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def _sound_only(path: Path) -> Path:
    import torch
    from torchcodec.encoders import AudioEncoder

    AudioEncoder(torch.zeros(1, 16000), sample_rate=16000).to_file(path)
    return path
