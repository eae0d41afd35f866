"""What is measured side by side: PEVLM's implementations, and the kernels that others ship.

Each is a function of (q, k, v, prompt) that returns ``[length, num_q_heads, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import Prompt

from pevlm_kernels import IMPLEMENTATIONS, flash, packed_plan, pevlm_attention
from pevlm_kernels.choice import refusal

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Prompt], torch.Tensor]


def dense_peers(device: torch.device) -> dict[str, Attention]:
    """Full causal attention, and nothing that copies or plans more than it needs; those that may
    have to compile something first come last."""
    if device.type == "cpu":
        return {"torch flash": partial(_sdpa, None)}
    peers: dict[str, Attention] = {
        "torch cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "torch flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    }
    peers |= {f"flash-attention {n}": _flash for n in releases(device)}
    peers |= {"own triton": partial(_own, "triton"), "sglang triton": _sglang_extend}
    return peers | {"flashinfer": _flashinfer}


def sparse_peers(device: torch.device) -> dict[str, Attention]:
    """The same mask: PEVLM's implementations, SGLang's kernel, FlashInfer, FlexAttention."""
    if device.type == "cpu":
        return {"pevlm sdpa": partial(_own, "sdpa")}
    peers: dict[str, Attention] = {}
    for name in IMPLEMENTATIONS:
        if name == "flash":  # on each of its releases
            numbered = (f"pevlm {name} {n}" for n in releases(device))
            peers |= dict.fromkeys(numbered, partial(_own, name))
        elif name != "reference":
            peers[f"pevlm {name}"] = partial(_own, name)
    return peers | {
        "sglang triton": _sglang_extend,
        "flashinfer": _flashinfer,
        "flex attention": _flex,
    }


def releases(device: torch.device) -> list[int]:
    """FlashAttention's releases that know this GPU."""
    known = flash.libraries_for(torch.cuda.get_device_capability(device))
    return [library.version for library in known]


@contextmanager
def release_of(name: str) -> Iterator[None]:
    """What a peer named after a release of FlashAttention has to run in: with no other one. Not for
    several threads."""
    number, known = name.rpartition(" ")[2], flash.LIBRARIES
    if number.isdigit():
        flash.LIBRARIES = tuple(library for library in known if library.version == int(number))
    try:
        yield
    finally:
        flash.LIBRARIES = known


def missing(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why one of them cannot run here, as far as that is known beforehand."""
    words = name.split()
    if name == "flashinfer" and find_spec(name) is None:
        return "not installed: pip install flashinfer-python"
    own = {"own": "triton", "flash-attention": "flash"}
    impl = words[1] if words[0] == "pevlm" else own.get(words[0])
    with release_of(name):
        return refusal(impl, q, k, v) if impl else None


def _own(
    impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: Prompt
) -> torch.Tensor:
    out: torch.Tensor = pevlm_attention(
        q, k, v, sink_end=prompt.sink_end, blocks=prompt.blocks, impl=impl
    )
    return out


def _sdpa(
    backend: SDPBackend | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt: Prompt,
) -> torch.Tensor:
    assert not prompt.blocks, "dense"
    attention = partial(
        torch.nn.functional.scaled_dot_product_attention,
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    if backend is None:
        return attention()[0].transpose(0, 1)
    with sdpa_kernel(backend):
        return attention()[0].transpose(0, 1)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """FlashAttention on the tensors as they lie: no copy."""
    assert not prompt.blocks, "dense"
    plan = packed_plan(prompt.length, prompt.length, (), q.device)
    library = flash.library_on(q.device)
    out: torch.Tensor = import_module(library.module).flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=plan.cu_seqlens_q,
        cu_seqlens_k=plan.cu_seqlens_k,
        max_seqlen_q=prompt.length,
        max_seqlen_k=prompt.length,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """FlashInfer's paged wrapper on the same virtual sequences, in pages of one token; planned in
    the first call."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    plan = packed_plan(prompt.length, prompt.sink_end, prompt.blocks, q.device)
    heads = (q.shape[1], k.shape[1], q.shape[2])
    if ("flashinfer", heads, q.dtype) not in plan.memo:
        workspace = torch.empty(384 * 2**20, dtype=torch.uint8, device=q.device)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.kv_indices.to(torch.int32),
            torch.ones(plan.num_seqs, dtype=torch.int32, device=q.device),
            *heads,
            1,
            causal=True,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        plan.memo["flashinfer", heads, q.dtype] = wrapper
    out: torch.Tensor = plan.memo["flashinfer", heads, q.dtype].run(q, (k[:, None], v[:, None]))
    return out


def _sglang_extend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: Prompt
) -> torch.Tensor:
    """SGLang's kernel, on what PEVLM's mixin for it plans: cached keys, then a sequence's own."""
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    plan = packed_plan(prompt.length, prompt.sink_end, prompt.blocks, q.device)
    if "sglang extend" not in plan.memo:
        lengths = zip(plan.seqlens_q, plan.kv_indices.split(list(plan.seqlens_k)), strict=True)
        cached = [own[: len(own) - n] for n, own in lengths]
        counts = torch.tensor([0, *map(len, cached)], device=q.device)
        plan.memo["sglang extend"] = (counts.cumsum(0).to(torch.int32), torch.cat(cached))
    kv_indptr, kv_indices = plan.memo["sglang extend"]
    out = torch.empty_like(q)
    extend_attention_fwd(
        q, k, v, out, k, v,
        plan.cu_seqlens_q, kv_indptr, kv_indices,
        None, True, None, plan.max_seqlen_q, 1.0, 1.0,
    )  # fmt: skip
    return out


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    mask = _flex_mask(prompt, q.device)
    heads = (part.transpose(0, 1)[None] for part in (q, k, v))
    out: torch.Tensor = _flex_function()(*heads, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def _flex_function() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _flex_mask(prompt: Prompt, device: torch.device) -> Any:
    """One number a token says its block: the sink's is 0, the question's the highest."""
    from torch.nn.attention.flex_attention import create_block_mask

    block = torch.zeros(prompt.length, dtype=torch.int32, device=device)
    for number, (start, end) in enumerate(prompt.blocks):
        block[start:end] = number + 1
    question = len(prompt.blocks) + 1
    block[prompt.blocks[-1][1] if prompt.blocks else prompt.length :] = question

    def visible(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (block[q] == block[k]) | (block[k] == 0) | (block[q] == question)
        return (k <= q) & seen

    return create_block_mask(
        visible, None, None, prompt.length, prompt.length, device=device, _compile=True
    )
