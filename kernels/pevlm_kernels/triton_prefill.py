"""The ``triton`` implementation: tile sizes, the schedule and the launch of ``triton_kernels``.

The programs with the most keys start first, or the last one would keep the whole GPU waiting: the
question attends to everything and a block to little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from pevlm_kernels.triton_kernels import attend
from pevlm_kernels.types import PrefillPlan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Tiling(NamedTuple):
    """Sizes of a program. ``block_m`` is also the grain of the schedule."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (fp32 queries, width of a head) → tilings, the one to take untried first. What speaks for them was
# read from the compiler, not measured: `ptxas -v` and shared memory for sm_80, sm_90 and sm_100.
# Keys and values take `2 * stages * block_n * width * bytes` of shared memory, the fp32 accumulator
# `block_m * width / (32 * num_warps)` of a thread's 255 registers.
SMALL: dict[tuple[bool, int], list[Tiling]] = {
    # Up to 99 KiB, which sm_86, sm_89 and sm_120 have; sm_80 has 163.
    (False, 64): [Tiling(128, 64, 4, 3)],
    # 64 keys need eight warps: with four they spill 1.1 kB a thread.
    (False, 128): [Tiling(128, 64, 8, 3), Tiling(128, 32, 4, 3)],
    (False, 256): [Tiling(64, 32, 4, 2)],
    (True, 64): [Tiling(64, 32, 4, 2)],
    (True, 128): [Tiling(64, 16, 4, 2)],
    (True, 256): [Tiling(32, 16, 4, 1)],
}
LARGE: dict[tuple[bool, int], list[Tiling]] = SMALL | {
    # Up to 227 KiB, on sm_90 and sm_100, where wgmma and tcgen05 take 64 or 128 rows a warp group.
    # Eight warps hold these with at most 52 B spilled; four spill 0.2 to 0.8 kB at a width of 128.
    (False, 64): [Tiling(128, 128, 8, 3), Tiling(128, 64, 4, 3)],
    (False, 128): [Tiling(128, 64, 8, 3), Tiling(128, 128, 8, 2)],
    (False, 256): [Tiling(128, 32, 8, 2), Tiling(128, 64, 8, 2)],
}
SMALL_BYTES, LARGE_BYTES = 99 * 1024, 227 * 1024


def candidates(width: int, dtype: torch.dtype, shared_memory: int) -> list[Tiling]:
    """The tilings worth trying, the one to take untried first.

    Args:
        width: of a head, the larger of keys and values.
        dtype: of the queries.
        shared_memory: bytes that one program may have.
    """
    table = LARGE if shared_memory >= LARGE_BYTES else SMALL
    return table[dtype == torch.float32, triton.next_power_of_2(max(width, 64))]


_tuned: dict[tuple[int, int, torch.dtype], Tiling] = {}


def tiling(width: int, dtype: torch.dtype, device: torch.device) -> Tiling:
    """The tiling that :func:`tune` found on this device, else the first candidate."""
    index = device.index or 0
    if (index, width, dtype) not in _tuned:
        _tuned[index, width, dtype] = candidates(width, dtype, _shared_memory(device))[0]
    return _tuned[index, width, dtype]


def tune(
    width: int, dtype: torch.dtype, device: torch.device, measure: Callable[[], float]
) -> dict[Tiling, float]:
    """Try all candidates and keep the fastest, for the rest of the process.

    Never called from :func:`prefill`: the time of a served request is no place for it. Nor does the
    choice depend on lengths, which no two requests share.

    Args:
        width, dtype: see :func:`candidates`.
        measure: seconds of a call that goes through :func:`prefill`.

    Returns:
        Seconds of each candidate.
    """
    key = (device.index or 0, width, dtype)
    seconds: dict[Tiling, float] = {}
    for candidate in candidates(width, dtype, _shared_memory(device)):
        _tuned[key] = candidate
        seconds[candidate] = measure()
    _tuned[key] = min(seconds, key=lambda candidate: seconds[candidate])
    return seconds


def _shared_memory(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter has no limit
        return LARGE_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float,
    v_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`pevlm_kernels.interface.pevlm_prefill`."""
    total_q, num_q_heads, head_dim = q.shape
    head_dim_v = v_cache.shape[2]
    out = torch.empty(total_q, num_q_heads, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_q_heads, total_q, dtype=torch.float32, device=q.device)
    q, k_cache, v_cache = (
        part if part.stride(2) == 1 else part.contiguous() for part in (q, k_cache, v_cache)
    )
    sizes = tiling(max(head_dim, head_dim_v), q.dtype, q.device)
    tiles = plan.tiles(sizes.block_m)
    # Heads are the faster axis: programs that run at the same time share keys in the L2 cache.
    attend[(num_q_heads, len(tiles))](
        q,
        k_cache,
        v_cache,
        out,
        lse,
        tiles,
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.kv_indices,
        softmax_scale * math.log2(math.e),
        v_scale,
        *q.stride()[:2],
        *k_cache.stride()[:2],
        *v_cache.stride()[:2],
        *out.stride()[:2],
        lse.stride(0),
        **constants(num_q_heads // k_cache.shape[1], head_dim, head_dim_v, sizes),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return out, lse


def constants(group: int, head_dim: int, head_dim_v: int, sizes: Tiling) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_DV": triton.next_power_of_2(head_dim_v),
        "BLOCK_M": sizes.block_m,
        "BLOCK_N": sizes.block_n,
    }


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why the kernel is not made for these tensors; None if it is."""
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 0):
            return f"expected a GPU of sm_80 or newer, got {capability}"
        if k_cache.dtype == torch.float8_e4m3fn and capability < (8, 9):
            return "expected float8_e5m2 or a wider cache on a GPU before sm_89, got float8_e4m3fn"
    elif isinstance(attend, triton.runtime.jit.JITFunction):  # and not interpreted
        return (
            "expected tensors on a CUDA GPU, or TRITON_INTERPRET=1 from before triton was "
            f"imported, got {q.device}"
        )
    if q.dtype not in DTYPES:
        return f"expected q in float16, bfloat16 or float32, got {q.dtype}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in (*DTYPES, *FP8):
            return f"expected {name} in q's dtypes or in fp8, got {cache.dtype}"
        if not 16 <= cache.shape[2] <= 256:
            return f"expected heads of 16 to 256, got {name} of {cache.shape[2]}"
    return None
