"""Where the time of a request's media went."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pevlm_sglang.media import stages as stages
from pevlm_sglang.media.slices import Reader
from pevlm_sglang.media.stages import (
    STAGES,
    ServerTiming,
    begin,
    report,
    stage,
    until_first_token,
)


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    token = stages._current.set(None)
    yield
    stages._current.reset(token)


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
    names = ("pevlm_media_frames_total", "pevlm_media_bytes_total")
    before = [sample(name) or 0.0 for name in names]

    def said() -> list[str]:
        return [record.message for record in caplog.records if record.name == stages.__name__]

    with caplog.at_level(logging.INFO, "pevlm_sglang"):
        report(metrics=True)  # text
        begin()
        report(metrics=True)
        assert not said()
        begin().add("decode", 0.25)
        stages.frames_decoded(3)
        stages.bytes_read(5000)
        report(metrics=True)
        report(metrics=True)
    assert said() == ["PEVLM media, #frame: 3, #byte: 5000, decode 0.250 s"]
    assert sample("pevlm_media_seconds_sum", {"stage": "decode"}) >= 0.25
    assert sample("pevlm_media_seconds_bucket", {"stage": "decode", "le": "0.3"}) >= 1
    assert [sample(name) for name in names] == [before[0] + 3, before[1] + 5000]


TIMES = {"queue_time": 0.5, "forward_entry_time": 100.0, "prefill_finished_time": 102.5}


def first_token(told: dict[str, float], *, single: bool = True) -> tuple[stages.Stages, list[Any]]:
    """What is known of a request with a video after three outputs, and these."""

    async def outputs() -> AsyncGenerator[Any, None]:
        begin().add("decode", 0.25)
        report(metrics=False)  # what begins then is the next of a batch
        for _ in range(3):
            yield {"meta_info": dict(told)}

    async def run() -> tuple[stages.Stages, list[Any]]:
        request = begin()
        passed = until_first_token(outputs(), SimpleNamespace(is_single=single))
        return request, [output async for output in passed]

    return asyncio.run(run())


def test_what_the_scheduler_says(caplog: pytest.LogCaptureFixture) -> None:
    """With the first output, once, and beside what is known of the media."""
    with caplog.at_level(logging.INFO, "pevlm_sglang"):
        request, outputs = first_token(TIMES)
    assert len(outputs) == 3
    assert request.seconds == {"decode": 0.25, "queue": 0.5, "prefill": 2.5}
    assert request.header() == "decode;dur=250.0, queue;dur=500.0, prefill;dur=2500.0"
    lines = [record.message for record in caplog.records if record.name == stages.__name__]
    assert lines[1:] == ["PEVLM first token, decode 0.250 s, queue 0.500 s, prefill 2.500 s"]


@pytest.mark.parametrize(
    ("told", "single"),
    [({}, True), (dict.fromkeys(("queue_time", "forward_entry_time"), 1.0), True), (TIMES, False)],
)
def test_what_the_scheduler_does_not_say(told: dict[str, float], single: bool) -> None:
    assert first_token(told, single=single)[0].seconds == {"decode": 0.25}


def test_outputs_that_nobody_wants_any_more() -> None:
    """End where they come from, which frees what the request holds."""
    ended = []

    async def outputs() -> AsyncGenerator[Any, None]:
        try:
            yield {"meta_info": TIMES}
            yield {"meta_info": TIMES}
        finally:
            ended.append(True)

    async def run() -> None:
        passed = until_first_token(outputs(), SimpleNamespace(is_single=True))
        assert (await anext(passed))["meta_info"] == TIMES
        await passed.aclose()
        assert ended

    asyncio.run(run())


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
