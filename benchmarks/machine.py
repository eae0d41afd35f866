"""The machine that a benchmark ran on, and how long something takes there."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    "pevlm-sglang",
    "torch",
    "triton",
    "transformers",
    "sglang",
    "sglang-kernel",
    "flash-attn",
    "flash-attn-4",
    "flashinfer-python",
)


def card(device: torch.device) -> dict[str, Any]:
    """Versions and hardware; on a CPU also its load, since what others run blurs every time."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    else:
        found |= {
            "device": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
        }
    return found


def one_thread() -> None:
    """For a benchmark on a CPU: where others run too, threads wait for each other at every small
    operation, and two can be ten times slower than one. Call before :func:`card`, which says so."""
    torch.set_num_threads(1)


def clock() -> float:
    """Seconds on a CPU: of the processor, in one thread, which waiting for others does not add to;
    by the wall, in several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def summary(found: dict[str, Any]) -> str:
    """A card in two lines: versions, and the machine."""
    versions = [f"{name} {found[name]}" for name in (*LIBRARIES, "python") if found[name]]
    rest = [name for name in found if name not in (*LIBRARIES, "python", "device")]
    machine = [str(found["device"]), *(f"{name} {found[name]}" for name in rest)]
    return f"{', '.join(versions)}\n{', '.join(machine)}"


def seconds(
    function: Callable[[], Any], device: torch.device, *, limit_s: float = 1.0, most: int = 20
) -> float:
    """The time of a call, after one that is not counted: the median on a GPU; on a CPU the
    shortest, since what others run there only ever adds.

    Args:
        limit_s: stop repeating when the calls together took this long.
        most: calls.
    """
    warm_up = one_call(function, device)
    if warm_up > 2 * limit_s:
        return warm_up  # so long that its warm-up is no part of it
    times: list[float] = []
    while len(times) < most and sum(times) < limit_s:
        times.append(one_call(function, device))
    return statistics.median(times) if device.type == "cuda" else min(times)


def one_call(function: Callable[[], Any], device: torch.device) -> float:
    """The time of one call: between CUDA events on a GPU, else by :func:`clock`."""
    return (_cuda_seconds if device.type == "cuda" else _cpu_seconds)(function)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result in one piece, so that a program that is killed leaves the one before; None
    writes nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(result) + "\n")
    whole.replace(path)


def _cuda_seconds(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _cpu_seconds(function: Callable[[], Any]) -> float:
    start = clock()
    function()
    return clock() - start


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
