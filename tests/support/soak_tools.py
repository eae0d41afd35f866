"""What a soak needs beside its clients: a gate for them, and a look at the server's memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median

import psutil


class Gate:
    """Open for all clients; closed, nobody is inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False

    @contextmanager
    def through(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()


class Memory:
    """Resident memory of a server's processes over time."""

    def __init__(self, launcher: int) -> None:
        process = psutil.Process(launcher)
        self._processes = {"launcher": process} | {
            child.name(): child for child in process.children(recursive=True)
        }
        self._sizes: dict[str, list[int]] = {name: [] for name in self._processes}

    def sample(self) -> None:
        for name, process in self._processes.items():
            try:
                self._sizes[name].append(process.memory_info().rss)
            except psutil.NoSuchProcess:  # which the clients find out
                self._sizes[name].append(0)

    def quarters(self) -> dict[str, list[float]]:
        found = {}
        for name, sizes in self._sizes.items():
            cuts = [len(sizes) * quarter // 4 for quarter in range(5)]
            parts = [sizes[start:end] for start, end in pairwise(cuts)]
            found[name] = [median(part) if part else 0 for part in parts]
        return found
