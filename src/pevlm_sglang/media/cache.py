"""Videos that are prepared stay so: the next question on one decodes nothing.

An entry is found by the digest of the video's source, by what is sampled and made of it, and by the
tenant (``cache_salt`` and ``extra_key`` of a request): nothing is found across those. Requests that
want the same at the same time prepare it once.
"""

from __future__ import annotations

import asyncio
import errno
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from pevlm_sglang.media import shared
from pevlm_sglang.media.clips import Clip, num_bytes

Clips = tuple[Clip, ...]


@dataclass
class _Pending:
    task: asyncio.Future[Clips]
    waiting: int = 0


class MediaCache:
    """Of the process that prepares media; used on its event loop, but for :meth:`room`.

    Args:
        limit: bytes of pixels; 0 = nothing is kept.
        report: told the bytes that are kept, and whether a look-up was a hit (None: no look-up).
    """

    def __init__(
        self, limit: int, report: Callable[[int, bool | None], None] = lambda kept, hit: None
    ) -> None:
        self._limit, self._report = limit, report
        self._kept: OrderedDict[Hashable, Clips] = OrderedDict()
        self._pending: dict[Hashable, _Pending] = {}
        self._lock = Lock()
        self._bytes = 0
        self._flushes = 0

    @property
    def enabled(self) -> bool:
        return self._limit > 0

    @property
    def num_bytes(self) -> int:
        """Bytes of pixels that are kept."""
        return self._bytes

    async def get(self, key: Hashable, prepare: Callable[[], Awaitable[Clips]]) -> Clips:
        """What is kept under a key, or prepared now.

        Raises:
            Exception: what ``prepare`` raises, for all who wait for it; nothing is kept.
        """
        if not self.enabled:
            return await prepare()
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
        if found is not None:
            self._report(self._bytes, True)
            return found
        if (pending := self._pending.get(key)) is None:
            self._report(self._bytes, False)
            pending = _Pending(asyncio.ensure_future(self._prepare(key, prepare, self._flushes)))
            self._pending[key] = pending
        else:
            self._report(self._bytes, True)
        return await self._wait(pending)

    async def _wait(self, pending: _Pending) -> Clips:
        """A client that hangs up stops the work if nobody else waits for it."""
        pending.waiting += 1
        try:
            return await asyncio.shield(pending.task)
        except asyncio.CancelledError:
            if pending.waiting == 1 and not pending.task.done():
                pending.task.cancel()
                await asyncio.wait([pending.task])
            raise
        finally:
            pending.waiting -= 1

    async def _prepare(
        self, key: Hashable, prepare: Callable[[], Awaitable[Clips]], flushes: int
    ) -> Clips:
        try:
            clips = await prepare()
        finally:
            del self._pending[key]
        if flushes == self._flushes and (size := num_bytes(clips)) <= self._limit:
            with self._lock:
                self._kept[key] = clips
                self._bytes += size
                while self._bytes > self._limit:
                    self._drop_oldest()
            self._report(self._bytes, None)
        return clips

    def _drop_oldest(self) -> None:
        _, clips = self._kept.popitem(last=False)
        self._bytes -= num_bytes(clips)

    def clear(self) -> None:
        """Keep nothing of before."""
        self._flushes += 1
        with self._lock:
            while self._kept:
                self._drop_oldest()
        self._report(self._bytes, None)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Shared memory for pixels; what is kept makes way for them. From any thread.

        Raises:
            RuntimeError: ``/dev/shm`` is full of what requests use now; the server's fault.
        """
        while True:
            try:
                return shared.empty(shape, dtype)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                with self._lock:
                    if not self._kept:
                        raise RuntimeError(_NO_ROOM) from error
                    self._drop_oldest()


_NO_ROOM = (
    "/dev/shm: expected room for a video's pixels, got none; give the container more of it "
    "(docker's --shm-size), or ask for fewer frames or pixels"
)


def tenant(request: Any) -> Hashable:
    """Whose a request is, by SGLang's ``GenerateReqInput``."""
    return getattr(request, "cache_salt", None), getattr(request, "extra_key", None)
