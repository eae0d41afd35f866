"""Where the time of a request's videos and images goes before the scheduler has it; and what the
scheduler says of the rest of it.

Added up over the threads that work on it at the same time, so it may exceed what the client waits.
Seen in ``/metrics``, in the log, and in the response's ``Server-Timing`` header, which browsers and
proxies understand (W3C, Server Timing).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

from pevlm_sglang.observe.timing import BUCKETS

logger = logging.getLogger(__name__)

STAGES = {
    "fetch": "reading or downloading the source, and opening it",
    "decode": "decoding the sampled frames",
    "resize": "resizing frames, in families whose processor does not do it",
    "process": "normalisation, patches, tiles; and the prompt's tokens",
    "hash": "digests of the source and of the resized frames",
    "transfer": "the way to the scheduler; a copy, but for videos",
}
SCHEDULER = {
    "queue": "waiting for the first prefill forward",
    "prefill": "from there to the first token, the vision tower included",
}
"""What the scheduler says of a request, with ``--enable-metrics``."""


@dataclass
class Stages:
    """Of one request.

    Attributes:
        seconds: by stage.
        frames: decoded.
        bytes: of the sources.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    frames: int = 0
    bytes: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def from_scheduler(self, told: Mapping[str, Any]) -> None:
        """Take over what a response's ``meta_info`` says, and log the whole."""
        began, ended = (told.get(f"{at}_time") for at in ("forward_entry", "prefill_finished"))
        if began is None or ended is None:
            return
        self.add("queue", told["queue_time"])
        self.add("prefill", ended - began)
        logger.info("PEVLM first token, %s", self)

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.seconds[name]:.3f} s" for name in self._names())

    def header(self) -> str:
        """The value of ``Server-Timing``, in milliseconds."""
        return ", ".join(f"{name};dur={1000 * self.seconds[name]:.1f}" for name in self._names())

    def _names(self) -> list[str]:
        return [name for name in (*STAGES, *SCHEDULER) if name in self.seconds]


_current: ContextVar[Stages | None] = ContextVar("pevlm_media_stages", default=None)


def begin() -> Stages:
    """What this task and those that it starts do from here on belongs to one request; the HTTP
    server has begun it already, an engine has not."""
    if (stages := _current.get()) is None:
        _current.set(stages := Stages())
    return stages


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The block is a stage of the current request; outside of requests, of none."""
    stages, began = _current.get(), time.perf_counter()
    try:
        yield
    finally:
        if stages is not None:
            stages.add(name, time.perf_counter() - began)


def frames_decoded(count: int) -> None:
    """Of the current request."""
    if (stages := _current.get()) is not None:
        with stages._lock:
            stages.frames += count


def bytes_read(count: int) -> None:
    """Of the sources of the current request."""
    if (stages := _current.get()) is not None:
        with stages._lock:
            stages.bytes += count


def report(*, metrics: bool) -> None:
    """The current request is on its way to the scheduler.

    Args:
        metrics: whether to feed Prometheus.
    """
    stages = _current.get()
    if stages is None or not stages.seconds:
        return
    logger.info("PEVLM media, #frame: %d, #byte: %d, %s", stages.frames, stages.bytes, stages)
    if metrics:
        histogram, frames, read = _prometheus()
        for name, seconds in stages.seconds.items():
            histogram.labels(name).observe(seconds)
        frames.inc(stages.frames)
        read.inc(stages.bytes)
    _current.set(Stages())  # the next request of a batch


async def until_first_token(
    outputs: AsyncGenerator[Any, None], request: Any
) -> AsyncGenerator[Any, None]:
    """The outputs of a request with media, as they come; with the first of them the scheduler's
    part of the time is known.

    Args:
        outputs: of SGLang's ``TokenizerManager.generate_request``.
        request: its ``GenerateReqInput``; of a batch, no single request's times are told.
    """
    stages, known = begin(), False
    async with aclosing(outputs):
        async for output in outputs:
            if not known and request.is_single:
                known = True
                stages.from_scheduler(output["meta_info"])
            yield output


def media_cache(kept: int, hit: bool | None) -> None:
    """What the media cache reports; see :class:`~pevlm_sglang.media.cache.MediaCache`."""
    if not _metrics_enabled():
        return
    size, lookups = _of_the_cache()
    size.set(kept)
    if hit is not None:
        lookups.labels("hit" if hit else "miss").inc()


def _metrics_enabled() -> bool:
    from sglang.srt.runtime_context import get_server_args

    return bool(get_server_args().enable_metrics)


@cache
def _of_the_cache() -> tuple[Any, Any]:
    from prometheus_client import Counter, Gauge

    size = Gauge(
        "pevlm_media_cache_bytes",
        "Pixels that stay prepared for the next question.",
        multiprocess_mode="livesum",
    )
    lookups = Counter(
        "pevlm_media_cache_lookups_total",
        "Videos looked up among those that stay prepared.",
        ["result"],
    )
    return size, lookups


@cache
def _prometheus() -> tuple[Any, Any, Any]:
    """In the running launcher: prometheus_client reads its directory when it is imported, which
    SGLang sets first."""
    from prometheus_client import Counter, Histogram

    text = "Time of a request's media by stage, over all threads that work on it."
    histogram = Histogram("pevlm_media_seconds", text, ["stage"], buckets=BUCKETS)
    frames = Counter("pevlm_media_frames_total", "Frames decoded.")
    return (
        histogram,
        frames,
        Counter("pevlm_media_bytes_total", "Bytes of videos' and images' files."),
    )


class ServerTiming:
    """ASGI middleware: the header, on responses to requests with media that have passed all stages
    by the time at which the response starts, which streams need not have."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        _current.set(None)
        stages = begin()

        async def with_header(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and stages.seconds:
                header = (b"server-timing", stages.header().encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self._app(scope, receive, with_header)
