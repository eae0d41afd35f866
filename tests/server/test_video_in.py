"""A video reaches the server by path, by file, http and data URL, and in every turn of a chat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.exchange import SYSTEM, VIDEO, Exchange, user
from support.video import video_data_url, write_video

pytestmark = [
    pytest.mark.server,
    pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True),
]

SMALL = {"pevlm": {"sink_frames": 2, "block_frames": 4}}


@pytest.fixture
def http_url(clip: Callable[..., Path]) -> Iterator[str]:
    """The clip on a web server of the loopback."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip(10).parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{clip(10).name}"
        server.shutdown()


def _sparse_tokens(exchange: Exchange) -> int:
    return exchange.server.info()["internal_states"][0]["pevlm"]["sparse_tokens"]


def _video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


@pytest.mark.parametrize("kind", ["path", "file", "http", "data"])
def test_ways_to_send_a_video(
    kind: str, exchange: Exchange, clip: Callable[..., Path], http_url: str
) -> None:
    url = {
        "path": str(clip(10)),
        "file": clip(10).as_uri(),
        "http": http_url,
        "data": video_data_url(clip(10)),
    }[kind]
    exchange.server.post("/flush_cache")
    before = _sparse_tokens(exchange)
    exchange.server.chat([_video(url)], max_tokens=2, custom_params=SMALL)
    assert _sparse_tokens(exchange) - before == 7 * 12  # the sink and the first block see all


@pytest.mark.parametrize(
    ("settings", "steps", "tokens"),
    [
        ({}, 10, 12),
        ({"fps": 1}, 5, 12),
        ({"max_frames": 7}, 3, 12),
        ({"max_pixels": 5000}, 10, 4),
        ({"fps": 4, "max_frames": 24, "max_pixels": 7000}, 12, 6),
    ],
)
def test_wishes_of_a_video_url(
    exchange: Exchange, clip: Callable[..., Path], settings: dict[str, Any], steps: int, tokens: int
) -> None:
    """12 tokens a step without wishes; the rest of the prompt is the same."""
    sizes = []
    for url in ({"url": str(clip(10)), **settings}, {"url": str(clip(10))}):
        answer = exchange.server.chat([{"type": "video_url", "video_url": url}], max_tokens=1)
        sizes.append(answer["usage"]["prompt_tokens"])
    assert sizes[0] - sizes[1] == steps * tokens - 10 * 12


def test_keyframes_of_a_video_url(exchange: Exchange, tmp_path: Path) -> None:
    """As many tokens, and another video to the caches; on a machine without a GPU, on the CPU."""
    path = write_video(tmp_path / "keyed.mp4", seconds=10, fps=10, group=7, seed=9)
    assert exchange.server.info()["pevlm"]["media_device"] == "cpu"
    exchange.server.post("/flush_cache")
    part = {"type": "video_url", "video_url": {"url": str(path), "frames": "keyframes"}}
    usage = exchange.server.chat([part], max_tokens=1)["usage"]
    found = []
    for wish in ({}, {"frames": "keyframes"}, {}, {"frames": "keyframes"}):
        answer = exchange.server.generate(
            text=SYSTEM + user(VIDEO),
            video_data=[{"url": str(path), **wish}],
            sampling_params={"max_new_tokens": 1},
        )
        found.append(answer["meta_info"])
    tokens = {one["prompt_tokens"] for one in found}
    assert len(tokens) == 1
    exact, keyframes, *again = (one["cached_tokens"] for one in found)
    assert exact < 50  # what stands before the video
    assert keyframes < 50 or keyframes == usage["prompt_tokens"] - 1  # the chat's
    assert again == [tokens.pop() - 1] * 2


def test_frames_sent_as_images(exchange: Exchange, picture: Callable[[int], Path]) -> None:
    """``image_url`` items in a row, as clients without video support send frames."""
    images = [{"type": "image_url", "image_url": {"url": str(picture(seed))}} for seed in range(6)]
    runs = {"sink_frames": 2, "block_frames": 1}
    for image_runs, sparse in ((True, 3 * 12), (False, 0)):
        exchange.server.post("/flush_cache")
        before = _sparse_tokens(exchange)
        override = {"pevlm": {**runs, "image_runs": image_runs}}
        exchange.server.chat(images, max_tokens=2, custom_params=override)
        assert _sparse_tokens(exchange) - before == sparse


def test_turns_of_a_chat(exchange: Exchange, clip: Callable[..., Path]) -> None:
    """A second video in a second turn: it is sparse, and the first turn is a prefix hit. (SGLang
    alone hashes the videos of a prompt as one, and has none.)"""
    exchange.server.post("/flush_cache")
    first = [_video(video_data_url(clip(10))), {"type": "text", "text": "What happens?"}]
    second = [{"type": "text", "text": "And here?"}, _video(video_data_url(clip(8, seed=3)))]
    messages: list[dict[str, Any]] = [{"role": "user", "content": first}]
    body = {"model": "tiny", "max_tokens": 2, "temperature": 0, "custom_params": SMALL}
    answer = exchange.server.post("/v1/chat/completions", {**body, "messages": messages}).json()
    messages += [answer["choices"][0]["message"], {"role": "user", "content": second}]
    before = _sparse_tokens(exchange)
    exchange.server.post("/v1/chat/completions", {**body, "messages": messages})
    assert _sparse_tokens(exchange) - before == 7 * 12
