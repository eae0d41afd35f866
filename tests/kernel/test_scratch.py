"""How much memory ``flash`` allocates besides its results, on tensors that hold nothing."""

from __future__ import annotations

import types
from itertools import accumulate

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pevlm_kernels import PrefillPlan, flash
from pevlm_kernels.flash_calls import SCRATCH_BYTES, TABLE_ENTRIES, Room, calls_of, room_for

META = torch.device("meta")
# (num_q_heads, num_kv_heads, head_dim): Qwen2.5-VL-7B's, and many key-value heads.
HEADS = [(28, 4, 128), (32, 32, 128), (16, 2, 256)]


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            tensor.untyped_storage()._cdata
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._known = {at: own for at, own in self._known.items() if not own[0].expired()}
        self.most = max(self.most, sum(nbytes for _, nbytes in self._known.values()))
        return result


def plan_of(lengths: list[tuple[int, int, bool]]) -> PrefillPlan:
    """Of (queries, keys, full)."""
    seqlens_q, seqlens_k, full = zip(*lengths, strict=True)
    cumulative = [
        torch.tensor([0, *accumulate(numbers)], dtype=torch.int32).to(META)
        for numbers in (seqlens_q, seqlens_k)
    ]
    indices = torch.empty(sum(seqlens_k), dtype=torch.int64, device=META)
    return PrefillPlan(*cumulative, indices, seqlens_q, seqlens_k, full)


def library(q, k, v, *, cu_seqlens_q, softmax_scale, causal, max_seqlen_q, **options):
    """Results of the right shapes, and nothing else."""
    return torch.empty_like(q), torch.empty(q.shape[1], len(q), device=META)


def scratch(
    monkeypatch: pytest.MonkeyPatch,
    plan: PrefillPlan,
    capability: tuple[int, int],
    heads: tuple[int, int, int],
    stored: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that a layer allocates at most, besides its results."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    monkeypatch.setattr(flash, "is_installed", lambda module: True)
    module = types.SimpleNamespace(flash_attn_varlen_func=library, flash_attn_with_kvcache=library)
    monkeypatch.setattr(flash, "_load", lambda name: module)
    num_q_heads, num_kv_heads, head_dim = heads
    q = torch.empty(plan.total_q, num_q_heads, head_dim, dtype=torch.bfloat16, device=META)
    cache = torch.empty(8_000_000, num_kv_heads, head_dim, dtype=stored, device=META)

    def layer() -> tuple[torch.Tensor, torch.Tensor]:
        return flash.prefill(q, cache, cache, plan, softmax_scale=0.1, v_scale=1.0)

    layer()  # the calls and tables of the plan stay for all layers
    with LiveBytes() as live:
        results = layer()
    return live.most - sum(result.untyped_storage().nbytes() for result in results)


VIDEO = [(40, 4_136, False), (4_096, 8_192, False), (4_056, 8_152, False)]
"""A chunk of 8k of a video with a sink and blocks of 4k."""
BATCHES = {
    "a chunk beside decode rows at 100k": [*VIDEO, *[(1, 100_000, True)] * 63],
    "a question of 1M": [*VIDEO, (64, 1_000_000, True)],
    "a sparse sequence of 400k": [(4_096, 400_000, False), *VIDEO],
    "a sparse sequence of as many queries": [(150_000, 150_100, False), (9, 9, True)],
    "a text of 150k at once": [*VIDEO, (150_000, 150_000, True)],
    "a video of 1M at once": [*[(4_096, 8_192, False)] * 250, (64, 1_024_064, True)],
}


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_scratch_has_one_bound(
    monkeypatch: pytest.MonkeyPatch,
    batch: list,
    stored: torch.dtype,
    capability: tuple[int, int],
    heads: tuple[int, int, int],
) -> None:
    assert scratch(monkeypatch, plan_of(batch), capability, heads, stored) <= SCRATCH_BYTES


def test_the_count_sees_what_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 thousand keys of 2 KiB, and not the decode rows'."""
    plan = plan_of(BATCHES["a chunk beside decode rows at 100k"])
    keys = sum(m for _, m, full in BATCHES["a chunk beside decode rows at 100k"] if not full)
    assert keys < 25_000
    taken = scratch(monkeypatch, plan, (9, 0), HEADS[0])
    assert taken > keys * 2 * 4 * 128 * 2
    assert taken < 2**27
    assert scratch(monkeypatch, plan, (8, 0), HEADS[0]) > 2**27


def test_tables_are_of_full_sequences_and_bounded() -> None:
    q = torch.empty(1, 28, 128, dtype=torch.bfloat16, device=META)
    room = room_for(q, q[:, :4], paged=True)
    for batch in (*BATCHES.values(), [(1, 1_000_000, True), *[(1, 10, True)] * 255]):
        calls = calls_of(plan_of(batch), room)
        tables = [call.table for call in calls if call.table is not None]
        assert any(full for *_, full in batch) == bool(tables)
        assert all(table.numel() <= max(TABLE_ENTRIES, table.shape[1]) for table in tables)
    (decode,) = [
        call.table
        for call in calls_of(plan_of(BATCHES["a chunk beside decode rows at 100k"]), room)
        if call.table is not None
    ]
    assert decode.nbytes == 63 * 100_000 * 4


def test_a_chunk_of_a_video_is_one_call() -> None:
    """As it was before there was a bound: the bound is above what a server's chunk needs."""
    q = torch.empty(1, 28, 128, dtype=torch.bfloat16, device=META)
    calls = calls_of(plan_of(VIDEO), room_for(q, q[:, :4], paged=True))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("queries", "keys", "calls"), [(2, 11, 1), (2, 10, 2), (1, 11, 2), (2, 6, 2), (2, 5, 3)]
)
def test_a_call_is_as_full_as_its_room(queries: int, keys: int, calls: int) -> None:
    """To the key and to the query; a sequence of more keys than fit is cut."""
    plan = plan_of([(1, 5, False), (1, 6, False)])
    found = calls_of(plan, Room(queries, keys, paged=False))
    assert len(found) == calls
    assert max(len(call.slots) for call in found) <= keys


@pytest.mark.parametrize(
    ("width", "stored", "paged"),
    [
        (128, torch.bfloat16, True),
        (112, torch.bfloat16, True),
        (120, torch.bfloat16, False),
        (144, torch.bfloat16, False),
        (256, torch.bfloat16, False),
        (128, torch.float8_e4m3fn, False),
    ],
)
def test_which_keys_are_read_where_they_lie(width: int, stored: torch.dtype, paged: bool) -> None:
    """Those that FlashAttention-4 takes pages of, and that need no conversion."""
    q = torch.empty(1, 28, width, dtype=torch.bfloat16, device=META)
    cache = torch.empty(9, 4, width, dtype=stored, device=META)
    assert room_for(q, cache, paged=True).paged == paged
    assert not room_for(q, cache, paged=False).paged
