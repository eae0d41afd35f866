"""A plugin of SGLang for the benchmarks' own servers: where the time of a request goes.

``install`` writes the entry point that SGLang looks for into a folder, for the PYTHONPATH of a
server. In the launcher the plugin times video decoding and all of the preparation of a request, in
the scheduler the forwards that prefill and the attention inside them: by the clock on a CPU,
between CUDA events on a GPU. ``/server_info`` then has the totals under ``internal_states[0]
["stopwatch"]``, in seconds:

- ``decode``: opening videos and decoding the frames that were sampled.
- ``prepare``: from a request's arrival in the tokenizer process to its token ids and pixels;
  decoding is in it.
- ``forward``: the prefill's forwards, metadata and vision tower among it.
- ``attention``: the language model's layers of attention, writing keys and values among it; of a
  prefill CUDA graph, where they run between its segments (breakable), and not where they are in it.
- ``vision``, ``vision_steps``: the vision tower, and how many steps it encoded (a number).

Nothing of it is part of the product.
"""

from __future__ import annotations

import functools
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

KEY = "stopwatch"
MODULE = "pevlm_stopwatch"
_DECODER = "sglang.srt.utils.video_decoder.VideoDecoderWrapper"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"


def install(folder: Path) -> Path:
    """Write this file and its entry point.

    Returns:
        ``folder``, for PYTHONPATH.
    """
    info = folder / f"{MODULE}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, folder / f"{MODULE}.py")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{MODULE} = {MODULE}:register\n")
    return folder


class _Clock:
    """Seconds by name, of blocks that may run in several threads."""

    def __init__(self) -> None:
        self.seconds = {"decode": 0.0, "prepare": 0.0}
        self._lock = threading.Lock()
        self._inside = threading.local()

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name] += seconds

    @contextmanager
    def outermost(self, name: str) -> Iterator[None]:
        """Time the block, unless one of this thread is being timed: functions call each other."""
        if getattr(self._inside, "yes", False):
            yield
            return
        self._inside.yes = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._inside.yes = False
            self.add(name, time.perf_counter() - start)


_clock = _Clock()
_forward, _attention, _vision = deque[Any](), deque[Any](), deque[Any]()
_totals = {"forward": 0.0, "attention": 0.0, "vision": 0.0, "vision_steps": 0.0}


def register() -> None:
    """SGLang's entry point, in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in {
        f"{_DECODER}.__init__": _timed_decode,
        f"{_DECODER}.get_frames_at": _timed_decode,
        f"{_DECODER}.get_frames_as_tensor": _timed_decode,
        f"{_MANAGER}._tokenize_one_request": _timed_preparation,
        f"{_MANAGER}.get_internal_state": _with_launchers_times,
        "sglang.srt.model_executor.model_runner.ModelRunner.forward": _timed_forward,
        # Not RadixAttention's, which the replay of a graph passes by.
        "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward": _timed_attention,
        "sglang.srt.managers.mm_utils.get_embedding_and_mask": _timed_vision,
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state": _with_schedulers_times,
    }.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _timed_decode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _clock.outermost("decode"):
        return original(*args, **kwargs)


async def _timed_preparation(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    start = time.perf_counter()
    result = await original(*args, **kwargs)
    _clock.add("prepare", time.perf_counter() - start)
    return result


async def _with_launchers_times(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    states = await original(*args, **kwargs)
    states[0][KEY] |= _clock.seconds
    return states


@contextmanager
def _timed(running: deque[Any], device: Any) -> Iterator[None]:
    """Time the block on a ``torch.device``, without waiting for it."""
    from pevlm_sglang.observe.timing import Timing

    timing = Timing(device)
    yield
    timing.stop()
    running.append(timing)


def _measured(running: deque[Any], device: Any, mode: Any) -> AbstractContextManager[None]:
    """Of prefills alone, and not while a graph is captured: an event in it has no time."""
    import torch

    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return nullcontext() if captured or not mode.is_extend() else _timed(running, device)


def _timed_forward(
    original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    import torch

    with _measured(_forward, torch.device(runner.device), forward_batch.forward_mode):
        return original(runner, forward_batch, *args, **kwargs)


def _timed_attention(
    original: Callable[..., Any],
    backend: Any,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    forward_batch: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    with _measured(_attention, q.device, forward_batch.forward_mode):
        return original(backend, q, k, v, layer, forward_batch, *args, **kwargs)


def _timed_vision(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    encode = kwargs["data_embedding_func"]

    @functools.wraps(encode)
    def timed(items: list[Any]) -> Any:
        grids = (item.model_specific_data.get("video_grid_thw") for item in items)
        _totals["vision_steps"] += sum(int(grid[:, 0].sum()) for grid in grids if grid is not None)
        with _timed(_vision, kwargs["input_ids"].device):
            return encode(items)

    # SGLang asks the method for its model (mm_schedule._can_skip_pre_embed_feature_move).
    timed.__self__ = getattr(encode, "__self__", None)  # type: ignore[attr-defined]
    return original(*args, **{**kwargs, "data_embedding_func": timed})


def _with_schedulers_times(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = original(*args, **kwargs)
    from pevlm_sglang.observe.timing import ended

    for name, running in (("forward", _forward), ("attention", _attention), ("vision", _vision)):
        _totals[name] += sum(seconds for _, seconds in ended(running))
    output.internal_state[KEY] = dict(_totals)
    return output
