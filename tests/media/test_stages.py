"""Where the time of a request's media went."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pevlm_sglang.media import stages as media_stages
from pevlm_sglang.media.slices import Reader
from pevlm_sglang.media.stages import STAGES, ServerTiming, begin, report, stage


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    token = media_stages._current.set(None)
    yield
    media_stages._current.reset(token)


class Video:
    frame_shape = (2, 2)

    def get_frames_at(self, indices: list[int]) -> torch.Tensor:
        time.sleep(0.001 * len(indices))
        return torch.zeros(len(indices), 2, 2, 3, dtype=torch.uint8)


def read(frames: int) -> None:
    """A video in a pool of threads, and two stages around it."""
    reader = Reader(2)

    async def reading() -> None:
        with stage("fetch"):
            await asyncio.sleep(0.01)
        await reader.read(Video(), range(frames), lambda start, frames: None)
        with stage("transfer"):
            time.sleep(0.01)

    asyncio.run(reading())
    reader.shutdown()


def test_stages_of_a_request() -> None:
    """Those in threads among them."""
    stages = begin()
    read(40)
    assert [*stages.seconds] == ["fetch", "decode", "transfer"]
    assert stages.frames == 40
    assert stages.seconds["decode"] >= 0.04
    assert all(name in STAGES for name in stages.seconds)


def test_requests_do_not_mix() -> None:
    found = {}

    async def request(name: str, seconds: float) -> None:
        stages = begin()
        with stage("fetch"):
            await asyncio.sleep(seconds)
        found[name] = stages.seconds["fetch"]

    async def both() -> None:
        await asyncio.gather(request("short", 0.01), request("long", 0.1))

    asyncio.run(both())
    assert found["short"] < 0.05 < found["long"]


def test_report(caplog: pytest.LogCaptureFixture) -> None:
    """Once a request: the next of a batch starts from nothing."""
    prometheus = pytest.importorskip("prometheus_client")
    sample = prometheus.REGISTRY.get_sample_value
    before = sample("pevlm_media_frames_total") or 0.0
    with caplog.at_level(logging.INFO, "pevlm_sglang"):
        report(metrics=True)  # text
        begin()
        report(metrics=True)
        assert not caplog.messages
        begin().add("decode", 0.25)
        media_stages.frames_decoded(3)
        report(metrics=True)
        report(metrics=True)
    assert caplog.messages == ["PEVLM media, #frame: 3, decode 0.250 s"]
    assert sample("pevlm_media_seconds_sum", {"stage": "decode"}) >= 0.25
    assert sample("pevlm_media_seconds_bucket", {"stage": "decode", "le": "0.3"}) >= 1
    assert sample("pevlm_media_frames_total") == before + 3


def answer(work: Any, method: str = "POST") -> dict[bytes, bytes]:
    """The response's headers of an application that works before it answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.ensure_future(work())  # in a task of its own, as in frameworks
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ServerTiming(app)({"type": "http", "method": method}, None, send))
    assert len(sent) == 2
    return dict(sent[0]["headers"])


def test_header() -> None:
    async def video() -> None:
        begin().add("decode", 0.5)
        begin().add("fetch", 0.0123)
        report(metrics=False)

    async def text() -> None:
        begin()
        report(metrics=False)

    assert answer(video) == {
        b"content-type": b"text/plain",
        b"server-timing": b"fetch;dur=12.3, decode;dur=500.0",
    }
    assert answer(text) == {b"content-type": b"text/plain"}
    assert answer(text, "GET") == {b"content-type": b"text/plain"}
