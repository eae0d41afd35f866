"""What a kernel needs to know about one forward."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch


class Shared(NamedTuple):
    """Neighbouring virtual sequences that begin with the same keys: the blocks of one video, and
    their sink.

    Attributes:
        first, end: the virtual sequences ``first : end``.
        num_keys: their first keys, which all lie before each one's own queries.
    """

    first: int
    end: int
    num_keys: int


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
        seams: None, or ``[num_seqs, 2]`` int32 on the device, (seam, shift): key j lies in row j of
            the cache below the seam, and in row j + shift from it on. The same as ``kv_indices``,
            for a kernel that would rather count than read a list. For one packed sequence only,
            where row i of the cache belongs to query i.
        shared: in order and without overlap; for a kernel that attends to shared keys once.
        memo: what implementations derived from the plan, for the layers that follow.

    Raises:
        ValueError: from the constructor, when the parts do not fit together.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_indices: torch.Tensor
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    seams: torch.Tensor | None = None
    shared: tuple[Shared, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        seams = self.seams
        if seams is not None and (
            seams.shape != (len(self.seqlens_q), 2) or seams.dtype != torch.int32
        ):
            raise ValueError(
                f"PrefillPlan.seams: expected shape ({len(self.seqlens_q)}, 2) and torch.int32, "
                f"got {tuple(seams.shape)} and {seams.dtype}"
            )
        for q, k in zip(self.seqlens_q, self.seqlens_k, strict=True):
            if not 0 < q <= k:
                raise ValueError(
                    f"PrefillPlan: expected 0 < seqlen_q <= seqlen_k, got {q} and {k}; every query "
                    "is one of its own keys"
                )
        at = 0
        for first, end, num_keys in self.shared:
            if not at <= first < end <= self.num_seqs:
                raise ValueError(
                    f"PrefillPlan.shared: expected {at} <= first < end <= {self.num_seqs}, in "
                    f"order and without overlap, got {first} and {end}"
                )
            most = min(self.seqlens_k[i] - self.seqlens_q[i] for i in range(first, end))
            if not 0 < num_keys <= most:
                raise ValueError(
                    f"PrefillPlan.shared: expected 0 < num_keys <= {most}, the keys before the "
                    f"queries of {first} : {end}, got {num_keys}"
                )
            at = end

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


def shared_keys(pasts: Iterable[tuple[Hashable, int]], *, at_least: int = 1) -> tuple[Shared, ...]:
    """Neighbours with the same past as :class:`Shared`.

    Args:
        pasts: of each virtual sequence, what its first keys are, and how many they are.
        at_least: neighbours, for it to be worth a mention.
    """
    found: list[Shared] = []
    at = 0
    for (_, num_keys), group in groupby(pasts):
        end = at + sum(1 for _ in group)
        if num_keys and end - at >= at_least:
            found.append(Shared(at, end, num_keys))
        at = end
    return tuple(found)


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
