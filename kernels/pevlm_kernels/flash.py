"""FlashAttention over virtual sequences: dense varlen on gathered keys, paged where all are seen.

FlashAttention's causal mask is aligned to the bottom right, as a virtual sequence needs it. Its
fast path wants each sequence's keys in a row, so those of sparse virtual sequences, a sink and a
block, are copied together, once a layer: twice the cache of a long video, 2 % of the attention's
time (arithmetic, not measured). A full one, which sees everything before it, has many keys for few
queries: a copy would cost as much as its attention. It is read where it lies, through a table of
pages of one token, the form in which SGLang serves it anyway.

Where the library has no such pages, or the cache holds another dtype than q, full ones are copied
too, and however long they are, all scratch together stays below ``flash_calls.SCRATCH_BYTES``.

The library is the newest that knows the GPU's generation; the only importer of all of them.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch

from pevlm_kernels.choice import is_installed
from pevlm_kernels.flash_calls import Call, calls_of, room_for
from pevlm_kernels.sdpa import merge_states
from pevlm_kernels.types import PrefillPlan

DTYPES = (torch.float16, torch.bfloat16)


class Library(NamedTuple):
    """A release of FlashAttention.

    Attributes:
        version: 2, 3 or 4.
        module: where ``flash_attn_varlen_func`` is.
        install: the command.
        generations: major compute capabilities that it was written for.
        paged: those of them on which it takes pages of one token.
        lse_argument: what makes it return the log-sum-exp.
    """

    version: int
    module: str
    install: str
    generations: tuple[int, ...]
    paged: tuple[int, ...]
    lse_argument: str


# Best first. FlashAttention-3 is Hopper's; 4 is Blackwell's, and runs from Ampere on; 2 runs
# everywhere and is tuned for Ampere. Pages may have any size on FlashAttention-3, and on 4 on
# data-centre Blackwell (it has none on Ampere and sm_120); 2 wants a multiple of 256.
LIBRARIES: tuple[Library, ...] = (
    Library(
        3, "sgl_kernel.flash_attn", "pip install sglang-kernel", (9,), (9,), "return_softmax_lse"
    ),
    Library(
        4, "flash_attn.cute", "pip install flash-attn-4", (8, 9, 10, 11, 12), (10, 11), "return_lse"
    ),
    Library(
        2,
        "flash_attn.flash_attn_interface",
        "pip install flash-attn --no-build-isolation",
        (8, 9, 10, 12),
        (),
        "return_attn_probs",
    ),
)


def libraries_for(capability: tuple[int, int]) -> list[Library]:
    """Those that know a GPU of this compute capability, installed or not, the best first."""
    found = [library for library in LIBRARIES if capability[0] in library.generations]
    # On Ampere, FlashAttention-2 is what 4 is measured against.
    return found[::-1] if capability[0] == 8 else found


def library_for(capability: tuple[int, int]) -> Library | None:
    """The best that is installed."""
    known = libraries_for(capability)
    return next((library for library in known if is_installed(library.module)), None)


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
    room = room_for(q, k_cache, paged=pages_on(q.device))
    if ("flash", room) not in plan.memo:
        plan.memo["flash", room] = calls_of(plan, room)
    calls: list[Call] = plan.memo["flash", room]
    if len(calls) == 1:
        out, lse = _attend(q, k_cache, v_cache, calls[0], softmax_scale)
    else:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        for call in calls:
            into = out[call.rows], lse[:, call.rows]
            part = _attend(q[call.rows], k_cache, v_cache, call, softmax_scale)
            if call.causal:  # the first on its rows
                into[0].copy_(part[0])
                into[1].copy_(part[1])
            else:
                merge_states(*into, *part)
            del part  # before the next call's
    return (out if v_scale == 1 else out.mul_(v_scale)), lse


def library_on(device: torch.device) -> Library:
    """The best that is installed for the GPU of tensors that were not refused."""
    library = library_for(torch.cuda.get_device_capability(device))
    assert library is not None, "refusal comes first"
    return library


def pages_on(device: torch.device) -> bool:
    """Whether the library takes pages of one token there."""
    return torch.cuda.get_device_capability(device)[0] in library_on(device).paged


def _attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    call: Call,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call, with the argument names that all releases share but for those of pages.

    Returns:
        ``[n, num_q_heads, head_dim]`` and ``[num_q_heads, n]``, the log-sum-exp.
    """
    library = library_on(q.device)
    name, lse_argument = "flash_attn_varlen_func", library.lse_argument
    if call.table is None:
        k, v = (cache[call.slots].to(q.dtype) for cache in (k_cache, v_cache))
        keys = {"cu_seqlens_k": call.cu_seqlens_k, "max_seqlen_k": call.max_seqlen_k}
    else:
        k, v = k_cache.unsqueeze(1), v_cache.unsqueeze(1)
        keys = {"page_table": call.table}
        if library.version == 3:  # SGLang's build of the varlen function drops its page table
            name = "flash_attn_with_kvcache"
            keys["cache_seqlens"] = call.seqlens_k
        else:
            keys |= {"seqused_k": call.seqlens_k, "max_seqlen_k": call.max_seqlen_k}
    out, lse, *_ = getattr(_load(library.module), name)(
        q,
        k,
        v,
        cu_seqlens_q=call.cu_seqlens_q,
        max_seqlen_q=call.max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=call.causal,
        **keys,
        **{lse_argument: True},
    )
    return out, lse


@cache
def _load(module: str) -> Any:
    return importlib.import_module(module)
