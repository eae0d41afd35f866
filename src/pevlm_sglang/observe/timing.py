"""How long something ran on its device, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DeviceTimer:
    """Adds up the time of code that may only queue its work, as on a GPU."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def measure(self, device: Any) -> Iterator[None]:
        """Time the block, on the current stream of a ``torch.device`` of type cuda, or by the
        clock on any other."""
        if device.type == "cuda":
            import torch

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
