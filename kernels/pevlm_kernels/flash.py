"""FlashAttention over virtual sequences: dense varlen on gathered keys and values.

FlashAttention's causal mask is aligned to the bottom right, as a virtual sequence needs it, and its
fast path wants each sequence's keys in a row. So the keys of virtual sequences are copied together,
once a layer: three times the cache of a long video, 2 % to 3 % of the attention's time. At most
``GATHERED_BYTES`` lie there at a time, or the keys of one virtual sequence where those are more:
what does not fit takes a second call.

The library is the newest that knows the GPU's generation; the only importer of all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from pevlm_kernels.choice import is_installed
from pevlm_kernels.types import PrefillPlan

DTYPES = (torch.float16, torch.bfloat16)
GATHERED_BYTES = 512 * 2**20


class Library(NamedTuple):
    """A release of FlashAttention.

    Attributes:
        version: 2, 3 or 4.
        module: where ``flash_attn_varlen_func`` is.
        install: the command.
        generations: major compute capabilities that it was written for.
        lse_argument: what makes it return the log-sum-exp.
    """

    version: int
    module: str
    install: str
    generations: tuple[int, ...]
    lse_argument: str


# Best first. FlashAttention-3 is Hopper's; 4 is Blackwell's, and runs from Ampere on; 2 runs
# everywhere and is tuned for Ampere.
LIBRARIES = (
    Library(3, "sgl_kernel.flash_attn", "pip install sglang-kernel", (9,), "return_softmax_lse"),
    Library(4, "flash_attn.cute", "pip install flash-attn-4", (8, 9, 10, 11, 12), "return_lse"),
    Library(
        2,
        "flash_attn.flash_attn_interface",
        "pip install flash-attn --no-build-isolation",
        (8, 9, 10, 12),
        "return_attn_probs",
    ),
)


def libraries_for(capability: tuple[int, int]) -> list[Library]:
    """Those that know a GPU of this compute capability, installed or not, the best first."""
    found = [library for library in LIBRARIES if capability[0] in library.generations]
    # On Ampere, FlashAttention-2 is what 4 is measured against.
    return found[::-1] if capability[0] == 8 else found


def library_for(capability: tuple[int, int]) -> Library | None:
    """The best that is installed; within :func:`only`, that one or none."""
    known = [library for library in libraries_for(capability) if _only in (None, library.version)]
    return next((library for library in known if is_installed(library.module)), None)


_only: int | None = None


@contextmanager
def only(version: int) -> Iterator[None]:
    """Take this release and no other, to measure it beside the others. Not for several threads."""
    global _only
    before, _only = _only, version
    try:
        yield
    finally:
        _only = before


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why FlashAttention does not take these tensors; None if it does."""
    if q.device.type != "cuda":
        return f"expected tensors on a CUDA GPU, got {q.device}"
    capability = torch.cuda.get_device_capability(q.device)
    if library_for(capability) is None:
        commands = " or ".join(library.install for library in libraries_for(capability))
        return f"no FlashAttention for compute capability {capability}: {commands or 'none exists'}"
    if q.dtype not in DTYPES:
        return f"expected q in float16 or bfloat16, got {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > 256 or v_cache.shape[2] != q.shape[2]:
        return (
            "expected heads of a multiple of 8 up to 256, values as wide as keys, "
            f"got {q.shape[2]} and {v_cache.shape[2]}"
        )
    return None


class Part(NamedTuple):
    """Virtual sequences of one varlen call.

    Attributes:
        rows: their queries.
        slots: their keys, ``[total_k]`` or a run of rows.
        cu_seqlens_q, cu_seqlens_k: ``[n + 1]`` int32, from 0.
        max_seqlen_q, max_seqlen_k: on the host.
    """

    rows: slice
    slots: torch.Tensor | slice
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


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
    most_keys = gathered_keys(q, k_cache)
    key = ("flash parts", most_keys)
    if key not in plan.memo:
        plan.memo[key] = parts_of(
            plan, plan.kv_indices, plan.cu_seqlens_k, plan.seqlens_k, most_keys
        )
    parts: list[Part] = plan.memo[key]
    out, lse = attend(q, k_cache, v_cache, parts, softmax_scale)
    return (out if v_scale == 1 else out * v_scale), lse


def gathered_keys(q: torch.Tensor, k_cache: torch.Tensor) -> int:
    """How many keys, with their values, ``GATHERED_BYTES`` hold in q's dtype."""
    return GATHERED_BYTES // (2 * k_cache.shape[1] * k_cache.shape[2] * q.element_size())


def parts_of(
    plan: PrefillPlan,
    slots: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqlens_k: Sequence[int],
    most_keys: int,
) -> list[Part]:
    """Cut the virtual sequences of a plan into calls of at most ``most_keys`` keys, or of one
    virtual sequence. Their keys are as given here; the plan's own have others."""
    ends: list[int] = []
    keys = 0
    for i, m in enumerate(seqlens_k):
        if keys and keys + m > most_keys:
            ends.append(i)
            keys = 0
        keys += m
    parts: list[Part] = []
    row = slot = first = 0
    for end in (*ends, len(seqlens_k)):
        lengths_q, lengths_k = plan.seqlens_q[first:end], seqlens_k[first:end]
        n, m = sum(lengths_q), sum(lengths_k)
        parts.append(
            Part(
                slice(row, row + n),
                slots[slot : slot + m],
                plan.cu_seqlens_q[first : end + 1] - plan.cu_seqlens_q[first],
                cu_seqlens_k[first : end + 1] - cu_seqlens_k[first],
                max(lengths_q),
                max(lengths_k),
            )
        )
        row, slot, first = row + n, slot + m, end
    return parts


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    parts: Sequence[Part],
    softmax_scale: float,
    *,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A varlen call a part, each on its own keys; the parts tile the queries.

    Returns:
        ``[n, num_q_heads, head_dim]`` and ``[num_q_heads, n]``, the log-sum-exp.
    """
    results = []
    for rows, slots, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k in parts:
        results.append(
            varlen(q.device)(
                q[rows],
                k_cache[slots].to(q.dtype),
                v_cache[slots].to(q.dtype),
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                softmax_scale=softmax_scale,
                causal=causal,
            )
        )
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


def varlen(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``flash_attn_varlen_func`` of the best library for a GPU, with the argument names that all
    releases share; returns output and ``[num_q_heads, total_q]`` log-sum-exp."""
    library = library_for(torch.cuda.get_device_capability(device))
    assert library is not None, "refusal comes first"
    return partial(_call, _load(library.module), library.lse_argument)


def _call(
    function: Any, lse_argument: str, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = function(*args, **kwargs, **{lse_argument: True})
    return out, lse


@cache
def _load(module: str) -> Any:
    return importlib.import_module(module).flash_attn_varlen_func
