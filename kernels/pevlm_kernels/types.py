"""What a kernel needs to know about one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
        full: for each whether it sees all tokens of its request before it: many keys for few
            queries, best read where they lie.
        memo: what implementations derived from the plan, for the layers that follow.

    Raises:
        ValueError: from the constructor, when the parts do not fit together.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_indices: torch.Tensor
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    full: tuple[bool, ...]
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_seqs = self.num_seqs
        for name in ("seqlens_k", "full"):
            if (found := len(getattr(self, name))) != num_seqs:
                raise ValueError(
                    f"PrefillPlan.{name}: expected as many as seqlens_q ({num_seqs}), got {found}"
                )
        for name, length, dtype in (
            ("cu_seqlens_q", num_seqs + 1, torch.int32),
            ("cu_seqlens_k", num_seqs + 1, torch.int32),
            ("kv_indices", sum(self.seqlens_k), torch.int64),
        ):
            tensor = getattr(self, name)
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

    def tiles(self, block_m: int) -> torch.Tensor:
        """The programs of a kernel that computes ``block_m`` queries in each, those with the most
        keys first. Built once a forward, for its first layer.

        Returns:
            ``[num_tiles, 2]`` int32 on the device: virtual sequence, and the tile's first query in
            it.
        """
        if ("tiles", block_m) not in self.memo:
            n = torch.tensor(self.seqlens_q, dtype=torch.int64)
            m = torch.tensor(self.seqlens_k, dtype=torch.int64)
            count = (n + block_m - 1) // block_m
            seq = torch.repeat_interleave(count)
            first = (torch.arange(len(seq)) - (count.cumsum(0) - count)[seq]) * block_m
            keys = (m - n)[seq] + torch.minimum(first + block_m, n[seq])
            order = keys.argsort(descending=True, stable=True)
            tiles = torch.stack([seq, first], dim=1)[order].to(torch.int32)
            self.memo["tiles", block_m] = upload(tiles, self.cu_seqlens_q.device)
        found: torch.Tensor = self.memo["tiles", block_m]
        return found


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small host tensor on the device, without waiting for it: a copy from pageable memory would
    hold the host until everything before it on the device is done."""
    return pinned(host, device).to(device, non_blocking=True)


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor in memory that a GPU can copy from by itself, where the device is one."""
    return host.pin_memory() if device.type == "cuda" else host


def upload_lists(lists: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Lists of numbers as int32 tensors on the device, in one copy."""
    flat = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int32)
    return list(upload(flat, device).split([len(numbers) for numbers in lists]))
