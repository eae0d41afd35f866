"""What PEVLM did, seen from outside: the log line, the counters, the totals in ``/server_info``."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from pevlm_sglang.attention.plan import VirtualSequence
from pevlm_sglang.layout import Layout, full_pairs
from pevlm_sglang.observe.timing import BUCKETS, Timing, ended

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
        prefill_seconds: time of prefill forwards on their device without the vision tower, of those
            that have ended.
    """

    sparse_tokens: int = 0
    dense_tokens: Counter[str] = field(default_factory=Counter)
    pairs_computed: int = 0
    pairs_saved: int = 0
    sparse_forwards: int = 0
    vision_runs: int = 0
    vision_items: int = 0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0

    def add(self, other: Totals) -> None:
        for total in fields(self):
            setattr(self, total.name, getattr(self, total.name) + getattr(other, total.name))

    def describe(self) -> dict[str, Any]:
        return vars(self) | {
            "dense_tokens": {reason: self.dense_tokens[reason] for reason in DENSE_REASONS},
            "vision_seconds": round(self.vision_seconds, 6),
            "prefill_seconds": round(self.prefill_seconds, 6),
        }


class _Prefill(Timing):
    """A prefill forward, without the vision tower.

    Attributes:
        kind: ``sparse`` with LOCAL tokens, else ``dense``.
        vision: runs of the tower in it.
    """

    def __init__(self, device: Any) -> None:
        self.kind, self.vision = "dense", list[Timing]()
        super().__init__(device)

    @property
    def seconds(self) -> float | None:
        if (seconds := super().seconds) is None:
            return None
        return seconds - sum(run.seconds or 0.0 for run in self.vision)  # ended before it


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
        self._runs: deque[Timing] = deque()  # those that their device works on
        self._prefills: deque[_Prefill] = deque()
        self._prefill: _Prefill | None = None

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
        if self._prefill is not None:
            self._prefill.kind = "sparse"
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
        timing = Timing(device)
        yield
        timing.stop()
        self._runs.append(timing)
        if self._prefill is not None:
            self._prefill.vision.append(timing)
        self._add(Totals(vision_runs=1, vision_items=num_items))

    @contextmanager
    def prefill(self, device: Any) -> Iterator[None]:
        """Time one prefill forward: the block, on a ``torch.device``."""
        self._prefill = prefill = _Prefill(device)
        yield
        self._prefill = None
        prefill.stop()
        self._prefills.append(prefill)
        self._add(Totals())

    def embeddings_kept(self, num_bytes: int) -> None:
        """Requests hold this much now."""
        self.kept_bytes = num_bytes
        if self._metrics:
            self._metrics.kept_bytes.set(num_bytes)

    def describe(self) -> dict[str, Any]:
        """The state of this process, for ``/server_info``."""
        self._add(Totals())
        return {**self.totals.describe(), "vision_kept_bytes": self.kept_bytes}

    def _add(self, delta: Totals) -> None:
        """What was counted, and the times that have become known."""
        for _, seconds in ended(self._runs):
            delta.vision_seconds += seconds
            if self._metrics:
                self._metrics.vision.observe(seconds)
        for prefill, seconds in ended(self._prefills):
            delta.prefill_seconds += seconds
            if self._metrics:
                self._metrics.prefill.labels(prefill.kind).observe(seconds)
        self.totals.add(delta)
        if self._metrics:
            self._metrics.add(delta)


class _Metrics:
    """What is in ``/metrics``. prometheus_client reads its directory when it is imported, which
    SGLang sets first: so it is imported here, in the running scheduler, and nowhere earlier."""

    def __init__(self) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge, Histogram

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
        self.vision = Histogram(
            "pevlm_vision_seconds", "A run of the vision tower on its device.", buckets=BUCKETS
        )
        self.prefill = Histogram(
            "pevlm_prefill_seconds",
            "A prefill forward on its device without the vision tower, by attention.",
            ["kind"],
            buckets=BUCKETS,
        )
        self.kept_bytes = Gauge(
            "pevlm_vision_kept_bytes",
            "Embeddings that requests hold between the chunks of their prefill.",
            multiprocess_mode="livesum",
        )
        self._tokens.labels("sparse", "")
        for reason in DENSE_REASONS:
            self._tokens.labels("dense", reason)
        for kind in ("sparse", "dense"):
            self.prefill.labels(kind)

    def add(self, delta: Totals) -> None:
        self._tokens.labels("sparse", "").inc(delta.sparse_tokens)
        for reason, tokens in delta.dense_tokens.items():
            self._tokens.labels("dense", reason).inc(tokens)
        self._pairs.labels("computed").inc(delta.pairs_computed)
        self._pairs.labels("saved").inc(delta.pairs_saved)
        self._runs.inc(delta.vision_runs)
