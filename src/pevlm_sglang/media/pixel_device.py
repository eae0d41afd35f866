"""The GPU on which slices of a video are resized, normalised and cut in patches.

A slice goes up once, as uint8. What is made of it comes back once; or it stays, where SGLang's
transport takes features from the GPU (``--mm-feature-transport cuda_ipc``) and nothing is kept for
the next question (``--pevlm-media-cache-mb 0``). At a time there are at
most as many bytes of slices, with all that is made on the way, as the server decodes into
(``--pevlm-media-memory-mb``), and at most as many bytes of results as SGLang's own pool for them
has (``SGLANG_MM_FEATURE_CACHE_MB``): what is larger would not find room there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from math import prod
from threading import Lock
from typing import Any

import torch

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.media.clips import Room

CHOSEN = "_pevlm_media_device"
"""Attribute of SGLang's server arguments: what :func:`choose` said in the launcher."""


def choose(asked: str, server_args: Any, *, able: bool) -> torch.device:
    """Where a server works on pixels.

    Args:
        asked: ``auto``, ``cpu`` or ``cuda``.
        server_args: SGLang's.
        able: whether the model's processor can on a GPU.

    Raises:
        UnsupportedError: a GPU is asked for, and there is none, or the processor cannot use it.
    """
    there = torch.cuda.is_available() and getattr(server_args, "device", None) != "cpu"
    if asked == "cpu" or (asked == "auto" and not (able and there)):
        return torch.device("cpu")
    if not able:
        raise UnsupportedError(
            "--pevlm-media-device: expected auto or cpu, this model's frames are preprocessed by "
            "transformers on the CPU, got cuda"
        )
    if not there:
        raise UnsupportedError(
            "--pevlm-media-device: expected auto or cpu on a server without a GPU, got cuda"
        )
    return torch.device("cuda", server_args.base_gpu_id)


class PixelDevice:
    """A device that the threads of a server's media share: one slice at a time is on it.

    Args:
        device: any; tests have the CPU in the GPU's place.
        memory: bytes of slices, and of all that is made on the way.
        kept: bytes of results; 0 = they come back.
    """

    def __init__(self, device: torch.device, memory: int, kept: int = 0) -> None:
        self.device = device
        self._memory, self._room = memory, kept
        self._working, self._counting = Lock(), Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, otherwise: Room) -> torch.Tensor:
        """Where a result is written: on the device while it has room, else in the host's memory.

        Args:
            otherwise: gives that.
        """
        size = prod(shape) * dtype.itemsize
        with self._counting:
            stays = size <= self._room
            self._room -= size * stays
        if not stays:
            return otherwise(shape, dtype)
        try:
            made = torch.empty(shape, dtype=dtype, device=self.device)
        except BaseException:
            self._give(size)
            raise
        weakref.finalize(made.untyped_storage(), self._give, size)  # views of it hold that
        return made

    def _give(self, size: int) -> None:
        with self._counting:
            self._room += size

    def work(
        self,
        frames: torch.Tensor,
        frame_bytes: int,
        multiple: int,
        work: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Bring a slice there, in parts that fit, and work on each.

        Args:
            frames: ``[n, height, width, 3]`` uint8 in the host's memory.
            frame_bytes: that a frame and the work on it take.
            multiple: of frames in a part, but for the last one. A part of so many is brought there
                whatever it takes.
            work: called with the place of a part's first frame, and the part; keeps nothing of
                what it makes there but in :meth:`empty`.
        """
        few = max(self._memory // frame_bytes // multiple, 1) * multiple
        for start in range(0, len(frames), few):
            part = frames[start : start + few]
            if self.device.type == "cuda":
                part = part.pin_memory()
            with self._working:
                work(start, part.to(self.device, non_blocking=True))


def of_server(server_args: Any, memory: int, *, keep: bool) -> PixelDevice | None:
    """The device that :func:`choose` has chosen; None = the CPU.

    Args:
        server_args: SGLang's.
        memory: bytes, see :class:`PixelDevice`.
        keep: whether SGLang's transport takes features from there.
    """
    from sglang.srt.multimodal.transport.cuda_ipc import MM_FEATURE_CACHE_SIZE

    device = torch.device(getattr(server_args, CHOSEN, "cpu"))
    if device.type == "cpu":
        return None
    return PixelDevice(device, memory, MM_FEATURE_CACHE_SIZE if keep else 0)
