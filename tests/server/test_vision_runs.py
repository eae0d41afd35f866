"""No step is encoded twice on a running server, and embeddings are gone afterwards."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pevlm_sglang.media.embeddings import EACH_STEP_ONCE
from support.exchange import IMAGE, SYSTEM, VIDEO, Exchange, Question, about, user
from support.oracle import Setting

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = pytest.mark.server
small_chunks = pytest.mark.parametrize("exchange", ["mixed_page_16"], indirect=True)
retracting = pytest.mark.parametrize(
    "exchange", ["qwen2_vl_retracting", "two_ranks_retracting"], indirect=True
)


CLIP = 8
"""Steps of a clip on these servers: a context block of 16 frames."""


def clips(steps: int) -> int:
    """Of a video."""
    return -(-steps // CLIP)


class Runs:
    """Counts the runs and items inside a ``with`` block, after which nothing may be held."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __enter__(self) -> Runs:
        self._before = self._exchange.totals()
        return self

    def __exit__(self, *error: object) -> None:
        after = self._exchange.totals()
        self.runs = after["vision_runs"] - self._before["vision_runs"]
        self.items = after["vision_items"] - self._before["vision_items"]
        self.held = after["vision_kept_bytes"]


@small_chunks
@pytest.mark.parametrize("setting", [Setting(16, 16), Setting(2, 2), None])
def test_each_clip_once_in_many_chunks(
    exchange: Exchange, clip: Clip, setting: Setting | None
) -> None:
    """360 tokens of video in chunks of 64, under PEVLM and under full attention."""
    exchange.flush()
    with Runs(exchange) as seen:
        exchange.check(about(clip(30), setting=setting))
    assert (seen.items, seen.held) == (clips(30), 0)
    assert seen.runs <= clips(30)
    assert EACH_STEP_ONCE in exchange.server.info()["pevlm"]["vision_corrections"]


@small_chunks
def test_prefix_hit(exchange: Exchange, clip: Clip) -> None:
    """The tower encodes the clips of which the cache lacks a token, and no other."""
    question = about(clip(30), setting=Setting(4, 4))
    exchange.flush()
    [answer] = exchange.check(question)
    steps = exchange.oracle.videos(exchange.inputs(question))[0]
    ends = [steps[min(at + CLIP, len(steps)) - 1][1] for at in range(0, len(steps), CLIP)]
    video_end = ends[-1]
    for start in (answer.prompt_tokens - 1, video_end - 16, video_end // 2, 40):
        with Runs(exchange) as seen:
            [answer] = exchange.check(replace(question, start=start))
        assert answer.cached_tokens == start // 16 * 16
        lacking = sum(end > answer.cached_tokens for end in ends)
        assert (seen.items, seen.held) == (lacking, 0), start


@small_chunks
def test_two_videos_and_an_image(exchange: Exchange, clip: Clip, picture: Picture) -> None:
    """SGLang makes one item of the videos of a prompt for this model; here each clip has one."""
    text = SYSTEM + user(f"{VIDEO}then {IMAGE} and {VIDEO}?")
    videos = (clip(10), clip(14, seed=1))
    exchange.flush()
    with Runs(exchange) as seen:
        exchange.check(Question(text, videos, (picture(0),), Setting(4, 4)))
    assert (seen.items, seen.held) == (clips(10) + clips(14) + 1, 0)


@pytest.mark.parametrize("exchange", ["qwen3_vl"], indirect=True)
def test_a_hit_that_covers_a_video(exchange: Exchange, clip: Clip) -> None:
    """Qwen3-VL: each video is encoded by itself, deepstack features included, and a hit that covers
    the first leaves the second alone to encode."""
    text = SYSTEM + user(f"{VIDEO}then {VIDEO}?")
    question = Question(text, (clip(20), clip(14, seed=1)), setting=Setting(4, 4))
    second = exchange.oracle.videos(exchange.inputs(question))[1]
    exchange.flush()
    cases = ((0, clips(20) + 2), (second[4][0] + 5, 2), (second[9][0], 1), (second[-1][1], 0))
    for start, items in cases:
        with Runs(exchange) as seen:
            [answer] = exchange.check(replace(question, start=start))
        assert answer.cached_tokens == start
        assert (seen.items, seen.held) == (items, 0), start


@small_chunks
def test_requests_together(exchange: Exchange, clip: Clip) -> None:
    """Each clip once; the cache serves those that come later with the same prompt."""
    exchange.flush()
    questions = [about(clip(seconds), setting=Setting(4, 4)) for seconds in (10, 14, 30)]
    text = Question(SYSTEM + user("Why?"))
    with Runs(exchange) as seen:
        exchange.check(*questions, text)
    assert (seen.items, seen.held) == (clips(10) + clips(14) + clips(30), 0)


@pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)
def test_upstream_cache_serves_repeats(exchange: Exchange, clip: Clip) -> None:
    """What fits into SGLang's own cache stays there; this server has it at its default. Another
    setting shares no keys, and the embedding all the same."""
    exchange.flush()
    for items, setting in ((clips(29), Setting(4, 4)), (0, Setting(2, 6))):
        with Runs(exchange) as seen:
            exchange.check(about(clip(29, seed=3), setting=setting))
        assert (seen.items, seen.held) == (items, 0)


@retracting
def test_retraction(exchange: Exchange, clip: Clip) -> None:
    """A retracted request has lost its keys and gave its embedding back: it encodes its video once
    more each time that it prefills it again, and no more."""
    questions = [about(clip(30), new_tokens=12), about(clip(20, seed=2), new_tokens=12)]
    exchange.flush()
    log = exchange.server.log()
    with Runs(exchange) as seen:
        answers = exchange.ask(*questions)
    exchange.compare(questions, answers)
    times = re.findall(r"#retracted_reqs: (\d+)", exchange.server.log()[len(log) :])
    assert times
    once = clips(30) + clips(20)
    assert once <= seen.items <= once + clips(30) * sum(map(int, times))
    assert seen.held == 0


@small_chunks
@pytest.mark.parametrize("how", ["disconnect", "abort_request"])
def test_abort_frees(exchange: Exchange, clip: Clip, how: str) -> None:
    """A request that ends in the middle of its video gives its embedding back."""
    exchange.flush()
    server = exchange.server
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    body = {
        "rid": f"long-{how}",
        "text": SYSTEM + user(VIDEO + "What happens?"),
        "video_data": [str(clip(240))],  # 2880 tokens in 45 chunks
        "sampling_params": {"max_new_tokens": 1},
    }
    with Runs(exchange) as seen:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/generate", json.dumps(body), headers)
        assert _wait_for(lambda: exchange.totals()["vision_kept_bytes"] > 0)
        if how == "abort_request":
            server.post("/abort_request", {"rid": body["rid"]})
        connection.close()
        assert _wait_for(lambda: exchange.totals()["vision_kept_bytes"] == 0)
    assert 1 <= seen.items <= clips(240)
    exchange.check(about(clip(10), setting=Setting(4, 4)))  # and the server goes on


def _wait_for(condition: Callable[[], bool], timeout: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False
