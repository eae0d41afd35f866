"""What PEVLM did, seen from outside: the log line, the counters, the totals in ``/server_info``."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from pevlm_sglang.attention.plan import VirtualSequence
from pevlm_sglang.layout import Layout, full_pairs

logger = logging.getLogger(__name__)

DENSE_REASONS = {
    "no_video": "text, or images that PEVLM leaves alone",
    "short_video": "the sink and one block hold the whole video",
    "disabled": "PEVLM is off for the request",
    "image_runs_off": "images only, and image runs are off",
    "global_token": "sink, text or question of a sparse prompt, which attend to everything",
}
NO_VIDEO, SHORT_VIDEO, DISABLED, IMAGE_RUNS_OFF, GLOBAL_TOKEN = DENSE_REASONS


@dataclass(frozen=True)
class RequestLayout:
    """The layout of one request, and why it is dense if it is.

    Attributes:
        layout: of the whole prompt.
        dense_reason: a key of ``DENSE_REASONS``; None when some token is sparse.
    """

    layout: Layout
    dense_reason: str | None


TEXT = RequestLayout(Layout(), NO_VIDEO)


@dataclass
class Totals:
    """Running totals of one scheduler process.

    Attributes:
        sparse_tokens: prefill tokens that attended to less than everything before them.
        dense_tokens: the other prefill tokens, by reason.
        pairs_computed: attended (query, key) pairs of one head and layer.
        pairs_saved: pairs that full attention would have computed besides.
        sparse_forwards: prefill forwards with at least one sparse token.
        vision_runs: runs of the vision tower.
        vision_items: videos and images that went into them; SGLang makes one item of all videos of
            a prompt for some models.
        vision_seconds: time of the runs on their device, of those that have ended.
    """

    sparse_tokens: int = 0
    dense_tokens: Counter[str] = field(default_factory=Counter)
    pairs_computed: int = 0
    pairs_saved: int = 0
    sparse_forwards: int = 0
    vision_runs: int = 0
    vision_items: int = 0
    vision_seconds: float = 0.0

    def add(self, other: Totals) -> None:
        for total in fields(self):
            setattr(self, total.name, getattr(self, total.name) + getattr(other, total.name))

    def describe(self) -> dict[str, Any]:
        return vars(self) | {
            "dense_tokens": {reason: self.dense_tokens[reason] for reason in DENSE_REASONS},
            "vision_seconds": round(self.vision_seconds, 6),
        }


class Observer:
    """Records prefill batches and runs of the vision tower.

    Args:
        log: whether this rank writes the log line (one rank a replica does).
        metrics: whether to feed Prometheus counters.

    Attributes:
        totals: of this process so far.
        decode_rows: of the forward at hand, the last requests of a mixed batch: their token is no
            prefill's, and is not counted.
        kept_bytes: of the embeddings that requests hold between the chunks of their prefill.
    """

    def __init__(self, *, log: bool, metrics: bool) -> None:
        self.totals = Totals()
        self.kept_bytes = 0
        self.decode_rows = 0
        self._log = log
        self._metrics = _Metrics() if metrics else None
        self._vision_timer = DeviceTimer()

    def dense_batch(
        self,
        requests: Sequence[RequestLayout],
        prefix_lens: Sequence[int],
        extend_lens: Sequence[int],
    ) -> None:
        """A batch that is ordinary full attention throughout."""
        delta = Totals()
        rows = [*zip(requests, prefix_lens, extend_lens, strict=True)]
        for request, prefix, extend in rows[: len(rows) - self.decode_rows]:
            delta.dense_tokens[request.dense_reason or GLOBAL_TOKEN] += extend
            delta.pairs_computed += full_pairs(prefix, prefix + extend)
        self._add(delta)

    def sparse_batch(
        self, requests: Sequence[RequestLayout], sequences: Sequence[VirtualSequence]
    ) -> None:
        """A batch with LOCAL tokens, cut into virtual sequences."""
        delta = Totals(sparse_forwards=1)
        blocks: set[tuple[int, int]] = set()
        for sequence in sequences:
            if sequence.row >= len(requests) - self.decode_rows:
                continue
            piece = sequence.piece
            tokens, pairs = piece.num_queries, piece.num_pairs
            delta.pairs_computed += pairs
            delta.pairs_saved += full_pairs(piece.start, piece.end) - pairs
            if piece.is_full:
                reason = requests[sequence.row].dense_reason or GLOBAL_TOKEN
                delta.dense_tokens[reason] += tokens
            else:
                delta.sparse_tokens += tokens
                blocks.add((sequence.row, piece.keys[-1][0]))  # where its last key range starts
        self._add(delta)
        if self._log:
            pairs = delta.pairs_computed + delta.pairs_saved
            logger.info(
                "PEVLM prefill batch, #req: %d, #token: %d, #sparse-token: %d, #block: %d, "
                "visible_fraction: %.4f",
                len(requests),
                delta.sparse_tokens + delta.dense_tokens.total(),
                delta.sparse_tokens,
                len(blocks),
                delta.pairs_computed / pairs,
            )

    @contextmanager
    def vision_run(self, num_items: int, device: Any) -> Iterator[None]:
        """Count and time one run of the vision tower: the block, on a ``torch.device``."""
        with self._vision_timer.measure(device):
            yield
        delta = Totals(vision_runs=1, vision_items=num_items)
        delta.vision_seconds = self._vision_timer.take()
        self._add(delta)

    def embeddings_kept(self, num_bytes: int) -> None:
        """Requests hold this much now."""
        self.kept_bytes = num_bytes
        if self._metrics:
            self._metrics.kept_bytes.set(num_bytes)

    def describe(self) -> dict[str, Any]:
        """The state of this process, for ``/server_info``."""
        self._add(Totals(vision_seconds=self._vision_timer.take()))
        return {**self.totals.describe(), "vision_kept_bytes": self.kept_bytes}

    def _add(self, delta: Totals) -> None:
        self.totals.add(delta)
        if self._metrics:
            self._metrics.add(delta)


class _Metrics:
    """What is in ``/metrics``. prometheus_client reads its directory when it is imported, which
    SGLang sets first: so it is imported here, in the running scheduler, and nowhere earlier."""

    def __init__(self) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge

        self._tokens = PrometheusCounter(
            "pevlm_prefill_tokens_total",
            "Prefill tokens by attention: sparse, or dense with the reason.",
            ["kind", "reason"],
        )
        self._pairs = PrometheusCounter(
            "pevlm_attention_pairs_total",
            "Attended (query, key) pairs of one head and layer: computed, or saved by PEVLM.",
            ["kind"],
        )
        self._runs = PrometheusCounter("pevlm_vision_runs_total", "Runs of the vision tower.")
        self._seconds = PrometheusCounter(
            "pevlm_vision_seconds_total", "Time of the vision tower's runs on their device."
        )
        self.kept_bytes = Gauge(
            "pevlm_vision_kept_bytes",
            "Embeddings that requests hold between the chunks of their prefill.",
            multiprocess_mode="livesum",
        )
        self._tokens.labels("sparse", "")
        for reason in DENSE_REASONS:
            self._tokens.labels("dense", reason)

    def add(self, delta: Totals) -> None:
        self._tokens.labels("sparse", "").inc(delta.sparse_tokens)
        for reason, tokens in delta.dense_tokens.items():
            self._tokens.labels("dense", reason).inc(tokens)
        self._pairs.labels("computed").inc(delta.pairs_computed)
        self._pairs.labels("saved").inc(delta.pairs_saved)
        self._runs.inc(delta.vision_runs)
        self._seconds.inc(delta.vision_seconds)


class DeviceTimer:
    """Adds up the time of code that may only queue its work, as a GPU does, and never waits."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def measure(self, device: Any) -> Iterator[None]:
        """Time the block, on the current stream of a ``torch.device`` of type cuda, or by the
        clock on any other."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._running.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds of the blocks that have ended on their device since the last call."""
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds
