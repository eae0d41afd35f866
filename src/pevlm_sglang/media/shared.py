"""Pixels in shared memory from the start, so that no request copies them on its way to the
scheduler.

A tensor here lies in a file of its own in ``/dev/shm``. SGLang's receiver takes a name there,
maps it and removes it (``ShmPointerMMData``, sglang/srt/managers/mm_utils.py): so each request gets
one more name of the same file, and the pixels last until the last of names and mappings is gone.
"""

from __future__ import annotations

import mmap
import os
import weakref
from math import prod
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import torch

_NAME = "_pevlm_shared_memory"
_FOLDER = Path("/dev/shm")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in shared memory; views of it are ordinary tensors.

    Raises:
        OSError: ``/dev/shm`` has no room for it.
    """
    from sglang.srt.utils.stale_shm_cleanup import make_shm_name

    size = max(1, prod(shape) * dtype.itemsize)
    memory = SharedMemory(make_shm_name("mm"), create=True, size=size)
    try:
        descriptor = memory._fd  # type: ignore[attr-defined]
        os.posix_fallocate(descriptor, 0, size)  # else a full /dev/shm kills the process, later
        mapped = mmap.mmap(descriptor, size)
    except BaseException:
        memory.unlink()
        raise
    finally:
        memory.close()
    tensor = torch.frombuffer(mapped, dtype=dtype, count=prod(shape)).view(shape)
    setattr(tensor, _NAME, memory.name)
    weakref.finalize(tensor, memory.unlink)
    return tensor


def pointer(tensor: torch.Tensor) -> Any:
    """What SGLang sends in place of a tensor of :func:`empty`, made without a copy; None for
    others."""
    from sglang.srt.managers.mm_utils import ShmPointerMMData
    from sglang.srt.utils.stale_shm_cleanup import make_shm_name

    if (name := getattr(tensor, _NAME, None)) is None:
        return None
    another = make_shm_name("mm")
    os.link(_FOLDER / name, _FOLDER / another)
    sent = ShmPointerMMData.__new__(ShmPointerMMData)
    sent.shm_name, sent.shape, sent.dtype = another, tensor.shape, tensor.dtype
    sent.precomputed_hash = sent.tensor = None
    sent._shm_handle = sent._materialization_error = None
    return sent
