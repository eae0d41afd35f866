"""Pixels on a device: the same values, within a bound, and results that stay while there is room.

Here the CPU has the place of the GPU, on the GPU's way through the code.
"""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.families.qwen_vl.sizes import PUBLISHED
from pevlm_sglang.families.qwen_vl.video import Patcher, Sampled, clip_buffer, frame_bytes
from pevlm_sglang.media.clips import ClipBuffer, new
from pevlm_sglang.media.pixel_device import PixelDevice, choose

CPU = torch.device("cpu")
GEOMETRY = PUBLISHED["qwen2_5_vl"]
MIB = 1 << 20
SIZES = [
    # a frame's width and height before and after the resize
    ((70, 50), (56, 28)),
    ((30, 64), (84, 112)),
    ((56, 84), (56, 84)),
    ((640, 36), (140, 28)),
]


def frames(count: int, size: tuple[int, int]) -> torch.Tensor:
    """``[count, height, width, 3]`` uint8: noise beside flat ground."""
    generator = torch.Generator().manual_seed(count)
    made = torch.randint(0, 256, (count, size[1], size[0], 3), generator=generator)
    made[:, :, : size[0] // 3] = 200
    return made.to(torch.uint8)


def buffer(sampled: Sampled, device: PixelDevice | None = None) -> ClipBuffer:
    """Of one clip."""
    room = new if device is None else partial(device.empty, otherwise=new)
    return clip_buffer(sampled, GEOMETRY, torch.float32, 1000, room)


def patches(
    video: torch.Tensor, after: tuple[int, int], device: PixelDevice | None, *, exact: bool
) -> torch.Tensor:
    """Of slices of 6 frames, as grey levels."""
    sampled = Sampled([*range(len(video))], after, {})
    out = buffer(sampled, device)
    levels = torch.zeros(3), torch.ones(3)
    patcher = Patcher(out, sampled, GEOMETRY, levels, exact=exact, device=device)
    for start in range(0, len(video), 6):
        patcher(start, video[start : start + 6])
    (clip,) = out.clips()
    return clip.pixels


@pytest.mark.parametrize("memory", [1, 200_000, 64 * MIB])
@pytest.mark.parametrize("kept", [0, 64 * MIB])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_are_the_cpus(size: Any, exact: bool, kept: int, memory: int) -> None:
    """An odd number of frames, in parts of a step, of some, and of the whole slice."""
    before, after = size
    video = frames(15, before)
    expected = patches(video, after, None, exact=exact)
    got = patches(video, after, PixelDevice(CPU, memory, kept), exact=exact)
    assert torch.equal(got, expected)


class Live(TorchDispatchMode):
    """Bytes of tensors that are made inside and live, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [((1280, 720), (644, 336)), ((96, 64), (140, 112))], ids=str)
def test_work_fits_what_is_reckoned_for_it(size: Any, exact: bool) -> None:
    """The slice itself aside, which here needs not go anywhere."""
    before, after = size
    video = frames(6, before)
    each = frame_bytes(before, after, exact=exact)
    sampled = Sampled([*range(6)], after, {})
    out = buffer(sampled)
    levels = torch.zeros(3), torch.ones(3)
    for count in (2, 6):
        device = PixelDevice(CPU, count * each)
        patcher = Patcher(out, sampled, GEOMETRY, levels, exact=exact, device=device)
        with Live() as live:
            patcher(0, video)
        made = live.most - video.nbytes
        assert count * each / 4 < made <= count * (each - 3 * before[0] * before[1])


def test_one_part_at_a_time() -> None:
    device, running, seen = PixelDevice(CPU, 100), 0, []

    def work(start: int, part: torch.Tensor) -> None:
        nonlocal running
        running += 1
        seen.append((running, start, len(part)))
        time.sleep(0.002)
        running -= 1

    slices = [frames(7, (4, 4)) for _ in range(4)]
    threads = [threading.Thread(target=device.work, args=(one, 40, 2, work)) for one in slices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {at_once for at_once, *_ in seen} == {1}
    assert sorted(seen) == sorted([(1, 0, 2), (1, 2, 2), (1, 4, 2), (1, 6, 1)] * 4)


def test_fault_gives_the_device_back() -> None:
    device = PixelDevice(CPU, 100)

    def broken(start: int, part: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        device.work(frames(2, (4, 4)), 1, 1, broken)
    done: list[int] = []
    device.work(frames(2, (4, 4)), 60, 1, lambda start, part: done.append(start))
    assert done == [0, 1]


def test_results_stay_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of one counts until the last view of it is gone."""
    meta = torch.device("meta")  # in the place of a GPU, so that it can be told from the host
    device = PixelDevice(meta, 100, kept=100)

    def stays(rows: int) -> torch.Tensor | None:
        made = device.empty((rows, 5), torch.float32, new)
        return made if made.device == meta else None

    first = stays(3)
    assert first is not None
    assert stays(3) is None
    assert stays(2) is not None  # and gone
    with torch.inference_mode():  # whose views do not know whose they are
        part = first[1:]
    del first
    assert stays(3) is None
    del part
    assert stays(5) is not None

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            device.empty((5, 5), torch.float32, new)
    assert stays(5) is not None
    assert PixelDevice(meta, 100).empty((1, 1), torch.float32, new).device == CPU


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SimpleNamespace(device="cuda", base_gpu_id=3)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        for able in (False, True):
            assert choose("cpu", server, able=able) == CPU
            wanted = torch.device("cuda", 3) if gpu and able else CPU
            assert choose("auto", server, able=able) == wanted
            if wanted == CPU:
                why = "without a GPU" if able else "this model's frames are preprocessed by"
                with pytest.raises(UnsupportedError, match=f"--pevlm-media-device: .*{why}"):
                    choose("cuda", server, able=able)
            else:
                assert choose("cuda", server, able=able) == wanted
    on_cpu = SimpleNamespace(device="cpu", base_gpu_id=0)
    assert choose("auto", on_cpu, able=True) == CPU


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [*SIZES, ((1280, 720), (644, 336))], ids=str)
def test_on_a_gpu(size: Any, exact: bool, kept: int) -> None:
    """Within a grey level in a ten-thousandth of the pixels, and within the bound."""
    before, after = size
    video, gpu = frames(12, before), torch.device("cuda", 0)
    memory = 4 * frame_bytes(before, after, exact=exact)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    got = patches(video, after, PixelDevice(gpu, memory, kept), exact=exact)
    assert got.is_cuda == bool(kept)
    result = got.nbytes if kept else 0
    assert torch.cuda.max_memory_allocated() - base <= memory + result + MIB  # weights of taps
    apart = (got.cpu() - patches(video, after, None, exact=exact)).abs()
    assert float(apart.max()) <= 1
    assert float((apart > 0).float().mean()) <= 1e-4
