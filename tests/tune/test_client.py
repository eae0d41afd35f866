"""The client of a PEVLM server: what it sends, what it reads, and what it says when it fails."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pevlm_sglang.tune.client import Client, ServerError, Token
from support.fake_server import ALL_PAIRS, PROMPT_TOKENS, FakeServer, events

SPARSE = {"enabled": True, "sink_frames": 2, "block_frames": 4}


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "a b.mp4"
    path.write_bytes(b"frames")
    return path


def test_what_is_sent(server: FakeServer, video: Path) -> None:
    Client(server.url + "/", api_key="secret").ask(
        video, "Say red", setting=SPARSE, max_tokens=7, top_logprobs=5
    )
    [body] = server.asked
    [message] = body["messages"]
    assert message["content"] == [
        {"type": "video_url", "video_url": {"url": f"file://{video.parent}/a%20b.mp4"}},
        {"type": "text", "text": "Say red"},
    ]
    assert body["custom_params"] == {"pevlm": SPARSE}
    assert (body["temperature"], body["max_tokens"]) == (0, 7)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    assert server.requests[-1].headers["Authorization"] == "Bearer secret"


def test_what_is_left_to_the_server(server: FakeServer, video: Path) -> None:
    Client(server.url).ask("http://there/video.mp4", "Say red")
    [body] = server.asked
    assert body["messages"][0]["content"][0]["video_url"]["url"] == "http://there/video.mp4"
    assert not {"custom_params", "logprobs", "top_logprobs"} & set(body)


def test_embedded_video(server: FakeServer, video: Path) -> None:
    Client(server.url, embed_videos=True).ask(video, "Say red")
    url = server.asked[0]["messages"][0]["content"][0]["video_url"]["url"]
    assert url == f"data:video/mp4;base64,{base64.b64encode(b'frames').decode()}"


def test_answer(server: FakeServer, video: Path) -> None:
    server.delays[2, 4] = 0.2
    answer = Client(server.url).ask(video, "Say red", setting=SPARSE, top_logprobs=2)
    assert (answer.text, answer.prompt_tokens, answer.finish_reason) == (
        "red",
        PROMPT_TOKENS,
        "stop",
    )
    assert 0.2 <= answer.ttft < 2, "the event with the role alone holds no token"
    assert answer.tokens == (Token("red", -0.3, {"red": -0.3, "wrong": -2.0}),), "no end of turn"


def test_answer_that_is_cut_keeps_its_last_token(server: FakeServer, video: Path) -> None:
    server.events = events("red blue", ("red", -0.1), (" blue", -0.2))
    server.events[1]["choices"][0]["logprobs"]["content"].pop()
    server.events[2]["choices"][0]["finish_reason"] = "length"
    answer = Client(server.url).ask(video, "Say red", top_logprobs=1)
    assert [token.text for token in answer.tokens] == ["red", " blue"]
    assert answer.finish_reason == "length"


def test_half_a_character_keeps_its_bytes(server: FakeServer, video: Path) -> None:
    server.events = events("é", ("?", -0.1), ("?", -0.2))
    halves = server.events[1]["choices"][0]["logprobs"]["content"]
    for token, byte in zip(halves, "é".encode(), strict=False):
        token["bytes"] = [byte]
    answer = Client(server.url).ask(video, "Say é", top_logprobs=1)
    assert [token.text for token in answer.tokens] == ["\udcc3", "\udca9"]


def test_measure_flushes_and_counts_all_replicas(server: FakeServer, video: Path) -> None:
    client = Client(server.url)
    for _ in range(3):  # the fake's replicas take turns
        answer, work = client.measure(video, "Say red", setting=SPARSE)
        assert (work.pairs_computed, work.pairs_saved) == (ALL_PAIRS - 1000, 1000)
        assert work.visible_fraction == pytest.approx(1 - 1000 / ALL_PAIRS)
        assert work.is_whole_prompt(answer.prompt_tokens)
        assert not work.is_whole_prompt(answer.prompt_tokens - 1)
    assert client.counters().pairs_saved == 3000
    assert server.order == ["/flush_cache", "/v1/chat/completions"] * 3


def test_environment_proxies_are_not_used(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert Client(server.url).config()["frames_per_step"] == 2


def without_pevlm(server: FakeServer) -> None:
    server.pevlm = None


def refuse(server: FakeServer) -> None:
    server.refuse = 400, {"object": "error", "message": "unknown option 'sink'"}


def fail_in_the_stream(server: FakeServer) -> None:
    server.events = [{"error": {"message": "out of\nmemory", "code": 500}}]


def break_off(server: FakeServer) -> None:
    server.events = events("red", ("red", -0.1))[:2]


def fall_silent(server: FakeServer) -> None:
    server.delays[2, 4] = 1.0


def test_tokens_end_where_one_was_not_streamed(server: FakeServer, video: Path) -> None:
    """SGLang 0.5.23 drops the log-probs of a token that comes without text."""
    server.events = events("aéb", ("a", -0.1), ("?", -0.2), ("b", -0.3))
    tokens = server.events[1]["choices"][0]["logprobs"]["content"]
    tokens[1]["bytes"] = [0xA9]  # the second half of é; the first was dropped
    answer = Client(server.url).ask(video, "Say aéb", top_logprobs=1)
    assert [token.text for token in answer.tokens] == ["a"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_pevlm, "without PEVLM; start it with --attention-backend pevlm"),
        (refuse, "expected HTTP 200, got 400: unknown option 'sink'"),
        (fail_in_the_stream, "/v1/chat/completions: out of memory"),
        (break_off, "a stream that broke off"),
        (fall_silent, "silent for 0.5 s"),
    ],
)
def test_errors(
    server: FakeServer, video: Path, spoil: Callable[[FakeServer], None], message: str
) -> None:
    spoil(server)
    client = Client(server.url, timeout=0.5)
    with pytest.raises(ServerError, match=r"^http://127\.0\.0\.1:") as caught:
        client.measure(video, "Say red", setting=SPARSE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_of_a_server_without_pevlm(server: FakeServer) -> None:
    server.pevlm = None
    with pytest.raises(ServerError, match="without PEVLM"):
        Client(server.url).config()


def test_no_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ServerError, match="expected an answer of a running SGLang server"):
        Client(url).info()


def test_missing_video(server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.mp4: expected a video file"):
        Client(server.url).ask(tmp_path / "none.mp4", "Say red")
