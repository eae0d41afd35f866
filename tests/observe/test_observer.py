"""observe.py: totals against the oracle's mask, however a prompt is chunked; log line, counters."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from test_layout import build, chunks, cut_sets
from test_oracle import Prompt, Video, blocks, prompts, sinks, visible_keys, write

from pevlm_sglang.attention.plan import virtual_sequences
from pevlm_sglang.layout import FrameSpans, Layout
from pevlm_sglang.observe.observer import (
    DENSE_REASONS,
    DISABLED,
    SHORT_VIDEO,
    TEXT,
    Observer,
    RequestLayout,
    Totals,
)


def observe(observer: Observer, *rows: tuple[RequestLayout, int, int]) -> None:
    """One prefill batch of (request, prefix, extend)."""
    requests, prefix_lens, extend_lens = (list(column) for column in zip(*rows, strict=True))
    layouts = [request.layout for request in requests]
    sequences = virtual_sequences(layouts, prefix_lens, extend_lens)
    if all(sequence.piece.is_full for sequence in sequences):
        observer.dense_batch(requests, prefix_lens, extend_lens)
    else:
        observer.sparse_batch(requests, sequences)


def totals_of(*batches: list[tuple[RequestLayout, int, int]]) -> Totals:
    observer = Observer(log=False, metrics=False)
    for batch in batches:
        observe(observer, *batch)
    return observer.totals


def sparse_request() -> RequestLayout:
    """Sink [0, 4), blocks [4, 7), [7, 10), [10, 13), a question from 13 on."""
    prompt = write(1, Video((3,) * 4), 7)
    return RequestLayout(build(prompt, 1, 1), None)


@pytest.mark.parametrize("sparse", [True, False])
def test_decode_rows_of_a_mixed_batch_are_no_prefill(sparse: bool) -> None:
    """They are its last ones."""
    rows = [(sparse_request() if sparse else TEXT, 0, 20), (TEXT, 0, 5)]
    observer = Observer(log=False, metrics=False)
    observer.decode_rows = 2
    observe(observer, *rows, (TEXT, 30, 1), (sparse_request(), 19, 1))
    assert observer.totals == totals_of(rows)
    observer.decode_rows = 0
    observe(observer, (TEXT, 30, 1))
    assert observer.totals != totals_of(rows)


@given(prompts(), sinks, blocks, cut_sets)
def test_totals_are_those_of_the_mask_for_any_chunking(
    prompt: Prompt, sink: int, block: int, cuts: set[int]
) -> None:
    rows = visible_keys(prompt, sink, block)
    layout = build(prompt, sink, block)
    reason = None if layout.first_sparse is not None else SHORT_VIDEO
    request = RequestLayout(layout, reason)
    parts = chunks(cuts, len(prompt))
    totals = totals_of(*([(request, start, end - start)] for start, end in parts))
    missing = [q + 1 - len(row) for q, row in enumerate(rows)]
    sparse = sum(count > 0 for count in missing)
    assert totals.sparse_tokens == sparse
    assert +totals.dense_tokens == +Counter({reason or "global_token": len(rows) - sparse})
    assert totals.pairs_computed == sum(len(row) for row in rows)
    assert totals.pairs_saved == sum(missing)
    assert totals.sparse_forwards == sum(any(missing[start:end]) for start, end in parts)


def test_golden_totals() -> None:
    """A prompt from its second block on beside text and a decode row, then dense batches."""
    short = RequestLayout(Layout(), SHORT_VIDEO)
    totals = totals_of(
        [(sparse_request(), 7, 8), (TEXT, 0, 5), (short, 9, 1)],
        [(RequestLayout(Layout(), DISABLED), 0, 3)],
        [(sparse_request(), 0, 7)],
    )
    # Two blocks of three against the sink of four, two tokens of the question; text; the row.
    assert totals.describe() == {
        "sparse_tokens": 6,
        "dense_tokens": {
            "no_video": 5,
            "short_video": 1,
            "disabled": 3,
            "image_runs_off": 0,
            "global_token": 2 + 7,
        },
        "pairs_computed": 2 * (5 + 6 + 7) + (14 + 15) + 15 + 10 + 6 + 28,
        "pairs_saved": 3 * 3 + 3 * 6,
        "sparse_forwards": 1,
        "vision_runs": 0,
        "vision_items": 0,
        "vision_seconds": 0.0,
        "prefill_seconds": 0.0,
    }


def test_nothing_observed_names_every_reason() -> None:
    described = Totals().describe()
    assert described["dense_tokens"] == dict.fromkeys(DENSE_REASONS, 0)
    assert set(described) == set(vars(Totals()))


def test_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """A block that two chunks of one forward share counts once; requests' blocks count apart."""
    observer = Observer(log=True, metrics=False)
    with caplog.at_level(logging.INFO, "pevlm_sglang.observe.observer"):
        observe(observer, (sparse_request(), 8, 4), (sparse_request(), 10, 2), (TEXT, 0, 1))
        observe(observer, (TEXT, 0, 4))
    (message,) = caplog.messages
    # Keys of the tokens 8 and 9, of 10 and 11 twice, of the text; over 9 + ... + 12, 11 + 12, 1.
    computed, full = (6 + 7) + 2 * (5 + 6) + 1, (9 + 10 + 11 + 12) + (11 + 12) + 1
    assert message == (
        "PEVLM prefill batch, #req: 3, #token: 7, #sparse-token: 6, #block: 3, "
        f"visible_fraction: {computed / full:.4f}"
    )


def test_text_in_a_block_of_images_does_not_cut_it_in_two(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = FrameSpans(tuple((4 * i, 4 * i + 3) for i in range(5)), image_run=True)
    layout = Layout.build([images], sink_frames=1, block_frames=2)
    with caplog.at_level(logging.INFO, "pevlm_sglang.observe.observer"):
        observe(Observer(log=True, metrics=False), (RequestLayout(layout, None), 0, 19))
    assert "#sparse-token: 6, #block: 1," in caplog.text


def test_silent_ranks_do_not_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pevlm_sglang.observe.observer"):
        totals_of([(sparse_request(), 0, 20)])
    assert caplog.messages == []


def test_prometheus_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge", "Histogram"):
        original = getattr(prometheus_client, kind)
        monkeypatch.setattr(prometheus_client, kind, partial(original, registry=registry))
    observer = Observer(log=False, metrics=True)

    def tokens(kind: str, reason: str) -> float | None:
        labels = {"kind": kind, "reason": reason}
        return registry.get_sample_value("pevlm_prefill_tokens_total", labels)

    assert tokens("sparse", "") == 0.0, "there from the start"
    assert [tokens("dense", reason) for reason in DENSE_REASONS] == [0.0] * len(DENSE_REASONS)
    observe(observer, (sparse_request(), 7, 8), (TEXT, 0, 5))
    observe(observer, (TEXT, 5, 1))
    totals = observer.totals
    assert tokens("sparse", "") == totals.sparse_tokens == 6
    assert tokens("dense", "no_video") == 6
    assert tokens("dense", "global_token") == 2
    for kind, value in (("computed", totals.pairs_computed), ("saved", totals.pairs_saved)):
        found = registry.get_sample_value("pevlm_attention_pairs_total", {"kind": kind})
        assert found == value > 0
    assert registry.get_sample_value("pevlm_vision_runs_total") == 0.0
    with observer.vision_run(2, torch.device("cpu")):
        time.sleep(0.002)
    observer.embeddings_kept(4096)
    assert registry.get_sample_value("pevlm_vision_runs_total") == 1.0
    assert registry.get_sample_value("pevlm_vision_seconds_sum") == totals.vision_seconds > 0
    assert registry.get_sample_value("pevlm_vision_seconds_bucket", {"le": "0.001"}) == 0
    assert registry.get_sample_value("pevlm_vision_seconds_count") == 1
    for request, seconds in ((TEXT, 0.002), (sparse_request(), 0.02)):
        with observer.prefill(torch.device("cpu")):
            observe(observer, (request, 0, 20))
            time.sleep(seconds)

    def prefills(what: str, kind: str) -> float:
        return registry.get_sample_value(f"pevlm_prefill_seconds_{what}", {"kind": kind})

    assert [prefills("count", kind) for kind in ("sparse", "dense")] == [1, 1]
    assert prefills("sum", "sparse") > 0.02 > prefills("sum", "dense") > 0.002
    assert prefills("sum", "sparse") + prefills("sum", "dense") == totals.prefill_seconds
    assert registry.get_sample_value("pevlm_vision_kept_bytes") == 4096


def test_vision_runs() -> None:
    observer = Observer(log=False, metrics=False)
    for num_items in (1, 3):
        with observer.vision_run(num_items, torch.device("cpu")):
            time.sleep(0.01)
    observer.embeddings_kept(4096)
    described = observer.describe()
    assert described["vision_runs"] == 2
    assert described["vision_items"] == 4
    assert 0.02 <= described["vision_seconds"] < 1
    assert described["vision_kept_bytes"] == 4096


class Event:
    """A CUDA event; its device works for a while that is another in each run, and has got as far as
    ``reached``."""

    now = reached = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.reached

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at  # milliseconds


def test_runs_on_a_gpu_are_timed_when_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    observer = Observer(log=False, metrics=False)
    for milliseconds in (500, 3000):
        with observer.vision_run(1, torch.device("cuda")):
            Event.now += milliseconds
    for reached, seconds in ((0, 0.0), (499, 0.0), (500, 0.5), (3499, 0.5), (3500, 3.5)):
        Event.reached = reached
        for _ in range(2):
            described = observer.describe()
            assert (described["vision_runs"], described["vision_seconds"]) == (2, seconds)


def test_a_prefill_is_timed_without_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no later batch waits for it: it is asked whether it has ended."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.now = Event.reached = 0
    observer, gpu = Observer(log=False, metrics=False), torch.device("cuda")
    for before, vision, after in ((100, 400, 500), (0, 0, 250)):
        with observer.prefill(gpu):
            Event.now += before
            if vision:
                with observer.vision_run(1, gpu):
                    Event.now += vision
            Event.now += after
    with observer.vision_run(1, gpu):  # of no prefill
        Event.now += 3000
    for reached, vision, prefill in (
        (499, 0.0, 0.0),
        (999, 0.4, 0.0),
        (1000, 0.4, 0.6),
        (1250, 0.4, 0.85),
        (4250, 3.4, 0.85),
    ):
        Event.reached = reached
        observe(observer, (TEXT, 0, 1))
        totals = observer.totals
        assert (totals.vision_seconds, totals.prefill_seconds) == pytest.approx((vision, prefill))


def test_a_prefill_that_fails_is_not_timed() -> None:
    observer, cpu = Observer(log=False, metrics=False), torch.device("cpu")
    with pytest.raises(RuntimeError, match="out of memory"), observer.prefill(cpu):
        raise RuntimeError("out of memory")
    with observer.vision_run(1, cpu):
        pass
    assert observer.totals.prefill_seconds == 0.0


SCHEDULERS = """
import os, sys
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from pevlm_sglang.observe.observer import Observer

def kept():
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return registry.get_sample_value("pevlm_vision_kept_bytes")

observer = Observer(log=False, metrics=True)
observer.embeddings_kept(100)
if (other := os.fork()) == 0:
    observer.embeddings_kept(28)
    os._exit(0)
os.waitpid(other, 0)
both = kept()
mark_process_dead(other)
print(both, kept())
"""


def test_kept_bytes_are_those_of_the_schedulers_that_live(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    done = subprocess.run(
        [sys.executable, "-c", SCHEDULERS],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["128.0", "100.0"]
