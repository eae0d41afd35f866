"""Videos that stay prepared: within a bound, once for all who ask, and for nobody else."""

from __future__ import annotations

import asyncio
import errno
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from pevlm_sglang.media import shared
from pevlm_sglang.media.cache import MediaCache, tenant
from pevlm_sglang.media.clips import Clip


def clips(size: int = 100) -> tuple[Clip, ...]:
    return (Clip(1, torch.zeros(size, dtype=torch.uint8), b""),)


class Source:
    """Prepares a video; counts how often."""

    def __init__(self, size: int = 100, error: Exception | None = None) -> None:
        self.size, self.error = size, error
        self.runs = self.cancelled = 0
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self) -> tuple[Clip, ...]:
        self.runs += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # threads that must end
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return clips(self.size)


def test_a_second_question_prepares_nothing() -> None:
    async def ask() -> None:
        cache, source, seen = MediaCache(1000), Source(), []
        cache._report = lambda kept, hit: seen.append((kept, hit))
        first = await cache.get("a", source)
        assert await cache.get("a", source) is first
        assert (source.runs, cache.num_bytes) == (1, 100)
        await cache.get("b", source)
        assert (source.runs, cache.num_bytes) == (2, 200)
        assert seen == [(0, False), (100, None), (100, True), (100, False), (200, None)]

    asyncio.run(ask())


def test_the_least_recent_goes() -> None:
    async def ask() -> None:
        cache, source = MediaCache(250), Source()
        for key in ("a", "b", "a", "c"):  # c takes the place of b
            await cache.get(key, source)
        assert (source.runs, cache.num_bytes) == (3, 200)
        await cache.get("a", source)
        assert source.runs == 3
        await cache.get("b", source)
        assert source.runs == 4

    asyncio.run(ask())


@pytest.mark.parametrize(("limit", "runs"), [(0, 2), (99, 2), (100, 1)])
def test_what_does_not_fit_is_not_kept(limit: int, runs: int) -> None:
    async def ask() -> None:
        cache, source = MediaCache(limit), Source()
        for _ in range(2):
            assert (await cache.get("a", source))[0].steps == 1
        assert (source.runs, cache.num_bytes) == (runs, 100 if runs == 1 else 0)

    asyncio.run(ask())


def test_who_asks_at_the_same_time_waits_for_one() -> None:
    async def ask() -> None:
        cache, source = MediaCache(1000), Source()
        source.go.clear()
        asking = [asyncio.ensure_future(cache.get("a", source)) for _ in range(5)]
        await asyncio.sleep(0)
        source.go.set()
        found = await asyncio.gather(*asking)
        assert source.runs == 1
        assert all(one is found[0] for one in found)

    asyncio.run(ask())


def test_who_hangs_up_stops_nobody_else() -> None:
    async def ask() -> None:
        cache, source = MediaCache(1000), Source()
        source.go.clear()
        first, second = (asyncio.ensure_future(cache.get("a", source)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        source.go.set()
        assert (await second)[0].steps == 1
        assert (source.runs, source.cancelled) == (1, 0)

    asyncio.run(ask())


def test_the_last_who_hangs_up_ends_the_work() -> None:
    async def ask() -> None:
        cache, source = MediaCache(1000), Source()
        source.go.clear()
        asking = [asyncio.ensure_future(cache.get("a", source)) for _ in range(2)]
        await asyncio.sleep(0.01)
        for one in asking:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        assert source.cancelled == 1  # and has ended
        source.go.set()
        await cache.get("a", source)
        assert (source.runs, cache.num_bytes) == (2, 100)

    asyncio.run(ask())


def test_a_fault_is_everybodys_and_is_not_kept() -> None:
    async def ask() -> None:
        cache, source = MediaCache(1000), Source(error=ValueError("broken"))
        asking = [cache.get("a", source) for _ in range(3)]
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert [str(one) for one in found] == ["broken"] * 3
        assert (source.runs, cache.num_bytes) == (1, 0)
        source.error = None
        await cache.get("a", source)
        assert source.runs == 2

    asyncio.run(ask())


def test_flush() -> None:
    async def ask() -> None:
        cache, source = MediaCache(1000), Source()
        await cache.get("a", source)
        source.go.clear()
        pending = asyncio.ensure_future(cache.get("b", source))
        await asyncio.sleep(0)
        cache.clear()
        assert cache.num_bytes == 0
        source.go.set()
        await pending
        assert cache.num_bytes == 0  # of before the flush
        await cache.get("a", source)
        assert source.runs == 3

    asyncio.run(ask())


def test_what_is_kept_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /dev/shm costs repeats their cache before it costs a request its answer."""
    cache, room, error = MediaCache(1000), [2], errno.ENOSPC

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if room[0]:
            room[0] -= 1
            raise OSError(error, "No space left on device")
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(shared, "empty", empty)
    for key in "abc":
        asyncio.run(cache.get(key, Source()))
    assert cache.room((3,), torch.uint8).shape == (3,)
    assert cache.num_bytes == 100
    room[0] = 9
    with pytest.raises(RuntimeError, match="/dev/shm: expected room"):
        cache.room((3,), torch.uint8)
    error = errno.EPERM
    with pytest.raises(OSError, match="No space"):
        cache.room((3,), torch.uint8)


def test_tenants() -> None:
    requests: list[Any] = [
        SimpleNamespace(cache_salt=salt, extra_key=key)
        for salt in (None, "a", "b")
        for key in (None, "a", "b")
    ]
    assert len({tenant(request) for request in requests}) == 9
    assert tenant(SimpleNamespace()) == (None, None)
