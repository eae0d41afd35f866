"""Reading the sampled frames of videos in slices of a few frames.

Slices of one video, and of several, are decoded and worked on side by side by the threads of one
pool, which all requests of a server share; what is decoded and not yet worked on has a bound.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from threading import Barrier
from typing import Any, TypeVar

import torch

from pevlm_sglang.media.keyframes import keyframes
from pevlm_sglang.media.stages import frames_decoded, stage
from pevlm_sglang.media.video_file import decoded, frame_bytes

SLICE_FRAMES = 32
MEMORY = 512 << 20
"""Bytes of decoded frames that a server holds, and of what they are resized in."""

_MOST_THREADS = 16  # each has a decoder of its own
_MOST_FFMPEG_THREADS = 4  # of a decoder; others decode too
_WORKING = 1.5  # bytes for a byte of a decoded frame, with what the work on it takes
_SHARE = 4  # of the memory that no slice exceeds, so that several fit

T = TypeVar("T")
Work = Callable[[int, torch.Tensor], None]
"""What is done with a slice: the position of its first frame among the sampled ones, and the frames
``[n, height, width, 3]`` uint8. Runs in a thread, at the same time as others of its video."""


class Reader:
    """The threads that decode, resize and preprocess the media of a server.

    Args:
        threads: of the pool; None = as many as cores, at most 16.
        memory: bytes, see :data:`MEMORY`.
    """

    def __init__(self, threads: int | None = None, memory: int = MEMORY) -> None:
        self.threads = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._memory = _Memory(memory)
        self._largest = memory // _SHARE
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pevlm-media")
        _one_torch_thread_each(self._pool, self.threads)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in a thread of the pool. Cancelled, it has ended or was never begun."""
        called = self._pool.submit(copy_context().run, function, *args)
        result = asyncio.wrap_future(called)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            if not called.cancel():
                await asyncio.wait([result])
            raise

    async def read(
        self, video: Any, indices: Sequence[int], work: Work, *, multiple: int = 1
    ) -> None:
        """Decode frames of a video, and work on them.

        Args:
            video: SGLang's ``VideoDecoderWrapper``.
            indices: of the frames, ascending.
            multiple: of frames in a slice, but for the last one.

        Raises:
            ValueError: see :func:`~pevlm_sglang.media.video_file.decoded`.
        """
        frame = frame_bytes(video) * _WORKING
        step = max(1, min(SLICE_FRAMES, int(self._largest // frame)) // multiple) * multiple
        several = _is_of_sglang(video) and len(indices) > step
        cuts = segments(indices, keyframes(video), step, self.threads if several else 1)
        threads = min(_MOST_FFMPEG_THREADS, self.threads // len(cuts)) if several else 1
        await all_of(
            self._segment(
                partial(_again, video, threads) if start or threads > 1 else lambda: video,
                [indices[at : min(at + step, end)] for at in range(start, end, step)],
                start,
                int(frame),
                work,
            )
            for start, end in cuts
        )

    async def _segment(
        self,
        open_video: Callable[[], Any],
        slices: Sequence[Sequence[int]],
        at: int,
        frame: int,
        work: Work,
    ) -> None:
        """Slices one after the other: each is decoded while the last one is worked on.

        Args:
            at: position of the first one's first frame.
            frame: bytes.
        """
        video = await self.run(open_video)
        last: asyncio.Future[None] | None = None
        try:
            for part in slices:
                held = frame * len(part)
                await self._memory.take(held)
                try:
                    frames = await self.run(_decoded, video, list(part))
                    if last is not None:
                        await last
                    last = asyncio.ensure_future(self._work(work, at, frames, held))
                    held = 0
                finally:
                    self._memory.give(held)
                at += len(part)
            if last is not None:
                await last
        finally:
            if last is not None:
                await asyncio.gather(last, return_exceptions=True)

    async def _work(self, work: Work, start: int, frames: torch.Tensor, held: int) -> None:
        try:
            await self.run(work, start, frames)
        finally:
            self._memory.give(held)

    def shutdown(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _decoded(video: Any, indices: list[int]) -> torch.Tensor:
    with stage("decode"):
        frames = decoded(video, indices)
    frames_decoded(len(indices))
    return frames


def segments(
    indices: Sequence[int], keys: Sequence[int] | None, step: int, most: int
) -> list[tuple[int, int]]:
    """Parts of the sampled frames, alike in length, that several decoders read at the same time.
    A decoder begins at the keyframe before its part: of what lies between, no more than an eighth
    of a part is decoded twice.

    Args:
        indices: of the sampled frames in the file, ascending.
        keys: of the file's keyframes, ascending; None = unknown.
        step: frames of a slice, of which a part has whole ones.
        most: parts.

    Returns:
        ``(start, end)`` of each, as positions in ``indices``.
    """
    starts = list(range(step, len(indices), step))
    if keys is not None:
        most_twice = (indices[-1] - indices[0]) // most // 8
        starts = [at for at in starts if _twice(keys, indices[at - 1], indices[at]) <= most_twice]
    wanted = (round(len(indices) * part / most) for part in range(1, most))
    cuts = sorted({min(starts, key=lambda at: abs(at - cut)) for cut in wanted} if starts else ())
    return list(zip([0, *cuts], [*cuts, len(indices)], strict=True))


def _twice(keys: Sequence[int], last: int, first: int) -> int:
    """Frames that a part which begins at ``first`` decodes, and the one before it, which ends at
    ``last``, too."""
    key = keys[max(bisect_right(keys, first) - 1, 0)]
    return max(last - key + 1, 0)


def _is_of_sglang(video: Any) -> bool:
    """Whether it has a file that can be opened once more."""
    return getattr(video, "_source", None) is not None


def _again(video: Any, threads: int) -> Any:
    """The file once more, decoded by as many threads of FFmpeg where its decoder takes a number:
    what a file gets whose keyframes are too few for several decoders."""
    options = getattr(video, "_tc_kwargs", {})
    opened = type(video)(video._source, device=options.get("device", "cpu"))
    if threads > 1 and options and "device" not in options:
        from torchcodec.decoders import VideoDecoder

        opened._decoder = VideoDecoder(video._source, num_ffmpeg_threads=threads, **options)
    return opened


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results; on the first exception the others are cancelled, and have ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class _Memory:
    """Bytes that coroutines of one loop take and give back, in the order in which they ask. One
    that asks for more than there is gets it when nothing else is taken."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> None:
        if not self._waiting and self._fits(amount):
            self._taken += amount
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(amount)
            raise

    def give(self, amount: int) -> None:
        self._taken -= amount
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self._taken += wanted
                turn.set_result(None)

    def _fits(self, amount: int) -> bool:
        return not self._taken or self._taken + amount <= self._limit


def _one_torch_thread_each(pool: ThreadPoolExecutor, threads: int) -> None:
    """The threads are as many as the cores; PyTorch would start as many again for each. It keeps
    the number for the thread, and for threads that start later, for whom it is set back."""
    before, all_started = torch.get_num_threads(), Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # a thread's first call takes over the number of all
        torch.set_num_threads(1)
        all_started.wait()

    started: list[Future[None]] = [pool.submit(start) for _ in range(threads)]
    for one in started:
        one.result()
    torch.set_num_threads(before)
