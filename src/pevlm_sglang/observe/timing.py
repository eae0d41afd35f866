"""Times of work on a device, without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
"""Seconds, of this package's histograms."""


class Timing:
    """The time from here to :meth:`stop`, of code that may only queue its work, as for a GPU.

    Args:
        device: a ``torch.device``; of type cuda its current stream is timed, by events, on any
            other it is the clock.
    """

    def __init__(self, device: Any) -> None:
        self._events: tuple[Any, Any] | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events = start, end
            start.record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        if self._events is None:
            self._seconds = time.perf_counter() - self._began
        else:
            self._events[1].record()

    @property
    def seconds(self) -> float | None:
        """None as long as the device works on it."""
        if self._events is None:
            return self._seconds
        start, end = self._events
        return start.elapsed_time(end) / 1000 if end.query() else None


T = TypeVar("T", bound=Timing)


def ended(running: deque[T]) -> Iterator[tuple[T, float]]:
    """Those that their device is done with, oldest first, and their seconds; the rest stays."""
    while running and (seconds := running[0].seconds) is not None:
        yield running.popleft(), seconds
