"""What a kernel needs to know about one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrefillPlan:
    """Virtual sequences of one forward: built once, used by every layer.

    Virtual sequence ``i`` holds the queries ``cu_seqlens_q[i] : cu_seqlens_q[i + 1]`` of the batch
    and attends to the cache slots ``kv_indices[cu_seqlens_k[i] : cu_seqlens_k[i + 1]]``, causal
    and aligned to the bottom right: its last key belongs to its last query.

    Attributes:
        cu_seqlens_q: ``[num_seqs + 1]`` int32 on the device.
        cu_seqlens_k: ``[num_seqs + 1]`` int32 on the device.
        kv_indices: ``[total_k]`` int64 on the device, slots of the key and value cache.
        seqlens_q: ``num_seqs`` query counts, on the host.
        seqlens_k: ``num_seqs`` key counts, on the host.

    Raises:
        ValueError: from the constructor, when the parts do not fit together.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_indices: torch.Tensor
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.seqlens_q) != len(self.seqlens_k):
            raise ValueError(
                f"PrefillPlan: expected as many seqlens_k as seqlens_q ({len(self.seqlens_q)}), "
                f"got {len(self.seqlens_k)}"
            )
        shapes = {
            "cu_seqlens_q": (self.cu_seqlens_q, len(self.seqlens_q) + 1, torch.int32),
            "cu_seqlens_k": (self.cu_seqlens_k, len(self.seqlens_k) + 1, torch.int32),
            "kv_indices": (self.kv_indices, sum(self.seqlens_k), torch.int64),
        }
        for name, (tensor, length, dtype) in shapes.items():
            if tensor.shape != (length,) or tensor.dtype != dtype:
                raise ValueError(
                    f"PrefillPlan.{name}: expected shape ({length},) and {dtype}, "
                    f"got {tuple(tensor.shape)} and {tensor.dtype}"
                )
        for q, k in zip(self.seqlens_q, self.seqlens_k, strict=True):
            if not 0 < q <= k:
                raise ValueError(
                    f"PrefillPlan: expected 0 < seqlen_q <= seqlen_k, got {q} and {k}; every query "
                    "is one of its own keys"
                )

    @property
    def num_seqs(self) -> int:
        return len(self.seqlens_q)

    @property
    def total_q(self) -> int:
        return sum(self.seqlens_q)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.seqlens_q, default=0)

    @property
    def max_seqlen_k(self) -> int:
        return max(self.seqlens_k, default=0)
