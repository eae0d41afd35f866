"""plan.py: expand a plan back to a mask and compare with the oracle, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_oracle import Prompt, Video, blocks, prompts, sinks, visible_keys, write
from torch.utils._python_dispatch import TorchDispatchMode

from pevlm_kernels import types
from pevlm_kernels.flash_calls import Room, calls_of, token_table
from pevlm_kernels.types import PrefillPlan
from pevlm_sglang.attention.plan import (
    VirtualSequence,
    build_plan,
    slot_lists,
    virtual_sequences,
)
from pevlm_sglang.layout import Layout, Piece
from pevlm_sglang.observe.observer import TEXT

GENERATED = 4


@dataclass
class Batch:
    """Requests of one forward, with a cache whose slots are handed out at random.

    Attributes:
        layouts, prefix_lens, extend_lens: as :func:`virtual_sequences` takes them.
        rows: the keys of each token of each request, from the oracle.
        req_to_token, req_pool_indices: as :func:`build_plan` takes them.
    """

    layouts: list[Layout]
    prefix_lens: list[int]
    extend_lens: list[int]
    rows: list[list[set[int]]]
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor

    @property
    def sequences(self) -> list[VirtualSequence]:
        return virtual_sequences(self.layouts, self.prefix_lens, self.extend_lens)

    @property
    def plan(self) -> PrefillPlan:
        return build_plan(self.sequences, self.req_to_token, self.req_pool_indices)

    def slots(self, request: int) -> list[int]:
        return self.req_to_token[self.req_pool_indices[request]].tolist()

    def queries(self) -> list[tuple[int, int]]:
        """(request, position) of every token of the forward."""
        lengths = zip(self.prefix_lens, self.extend_lens, strict=True)
        return [(r, q) for r, (p, n) in enumerate(lengths) for q in range(p, p + n)]

    def expected(self) -> list[set[int]]:
        """The slots that each token of the forward attends to."""
        return [{self.slots(r)[k] for k in self.rows[r][q]} for r, q in self.queries()]


def make_batch(
    requests: list[tuple[Prompt, int, int]], sink: int, block: int, seed: int = 0
) -> Batch:
    """A batch of (prompt, prefix, extend)."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(len(prompt) + GENERATED for prompt, _, _ in requests)
    pool = len(requests) + 2
    slots = torch.randperm(pool * longest, generator=generator)
    return Batch(
        [
            Layout.build(prompt.videos, sink_frames=sink, block_frames=block)
            for prompt, _, _ in requests
        ],
        [prefix for _, prefix, _ in requests],
        [extend for _, _, extend in requests],
        [visible_keys(prompt, sink, block, GENERATED) for prompt, _, _ in requests],
        slots.view(pool, longest).to(torch.int32),
        torch.randperm(pool, generator=generator)[: len(requests)],
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Chunks of prompts with and without videos, after a prefix, and decode rows."""
    requests = []
    for prompt in draw(st.lists(prompts(max_videos=2), min_size=1, max_size=4)):
        length = len(prompt) + GENERATED
        prefix = draw(st.integers(0, length - 1))
        extend = draw(st.just(1) | st.integers(1, length - prefix))
        requests.append((prompt, prefix, extend))
    return make_batch(requests, draw(sinks), draw(blocks), draw(st.integers(0, 2**31)))


def read_back(plan: PrefillPlan) -> list[list[int]]:
    """The slots that each query of a plan attends to: causal, aligned to the bottom right."""
    q, k, slots = (
        part.tolist() for part in (plan.cu_seqlens_q, plan.cu_seqlens_k, plan.kv_indices)
    )
    return [
        slots[k[i] : k[i + 1] - (q[i + 1] - 1 - query)]
        for i in range(plan.num_seqs)
        for query in range(q[i], q[i + 1])
    ]


@given(batches())
def test_plan_expands_to_visible(batch: Batch) -> None:
    found = read_back(batch.plan)
    assert [set(row) for row in found] == batch.expected()
    assert all(len(set(row)) == len(row) for row in found), "a key counted twice"


@given(batches())
def test_plan_is_well_formed(batch: Batch) -> None:
    plan = batch.plan
    assert plan.cu_seqlens_q.dtype == plan.cu_seqlens_k.dtype == torch.int32
    assert plan.kv_indices.dtype == torch.int64
    assert plan.cu_seqlens_q.diff().tolist() == list(plan.seqlens_q)
    assert plan.cu_seqlens_k.diff().tolist() == list(plan.seqlens_k)
    assert plan.kv_indices.shape == (sum(plan.seqlens_k),)
    assert plan.num_seqs == len(batch.sequences)
    assert plan.total_q == sum(batch.extend_lens)
    assert plan.max_seqlen_q == max(plan.seqlens_q)
    assert plan.max_seqlen_k == max(plan.seqlens_k)


@given(batches())
def test_triton_form_expands_to_visible(batch: Batch) -> None:
    """Cached slots of each sequence, then its own tokens, causal."""
    own_slots = [batch.slots(request)[q] for request, q in batch.queries()]
    cu_seqlens_q, cu_seqlens_k, slots = slot_lists(
        [sequence.piece.num_queries for sequence in batch.sequences],
        [(sequence.row, sequence.piece.keys_before_start()) for sequence in batch.sequences],
        batch.req_to_token,
        batch.req_pool_indices,
    )
    found, row = [], 0
    cached_slots = slots.split(cu_seqlens_k.diff().tolist())
    for cached, n in zip(cached_slots, cu_seqlens_q.diff().tolist(), strict=True):
        own = own_slots[row : row + n]
        assert not set(cached.tolist()) & set(own)
        found += [set(cached.tolist() + own[: query + 1]) for query in range(n)]
        row += n
    assert found == batch.expected()


@given(batches())
def test_full_sequences_see_everything_before_them(batch: Batch) -> None:
    plan = batch.plan
    rows = torch.arange(plan.total_q).split(list(plan.seqlens_q))
    for own, full in zip(rows, plan.full, strict=True):
        queries = [batch.queries()[row] for row in own.tolist()]
        assert full == all(batch.rows[r][q] == set(range(q + 1)) for r, q in queries)


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_order_of_requests_is_kept(batch: Batch, random: Random) -> None:
    order = list(range(len(batch.layouts)))
    random.shuffle(order)
    shuffled = Batch(
        *([part[i] for i in order] for part in (batch.layouts, batch.prefix_lens)),
        *([part[i] for i in order] for part in (batch.extend_lens, batch.rows)),
        batch.req_to_token,
        batch.req_pool_indices[order],
    )
    of_request: dict[int, list[list[int]]] = {}
    for (request, _), row in zip(batch.queries(), read_back(batch.plan), strict=True):
        of_request.setdefault(request, []).append(row)
    assert read_back(shuffled.plan) == [row for request in order for row in of_request[request]]


def test_golden_plan() -> None:
    """A video request in the middle of its second block, a text request, a decode row."""
    video = Layout.build(write(1, Video((2,) * 4), 1).videos, sink_frames=1, block_frames=1)
    # Sink [0, 3), blocks [3, 5), [5, 7), [7, 9), question [9, 10); slot = 100 * row + position.
    req_to_token = torch.arange(300, dtype=torch.int32).view(3, 100)
    sequences = virtual_sequences([video, Layout(), Layout()], [6, 0, 4], [4, 3, 1])
    assert sequences == [
        VirtualSequence(0, Piece(6, 7, ((0, 3), (5, 7)))),
        VirtualSequence(0, Piece(7, 9, ((0, 3), (7, 9)))),
        VirtualSequence(0, Piece(9, 10, ((0, 10),))),
        VirtualSequence(1, Piece(0, 3, ((0, 3),))),
        VirtualSequence(2, Piece(4, 5, ((0, 5),))),
    ]
    plan = build_plan(sequences, req_to_token, torch.tensor([2, 0, 1]))
    assert plan.seqlens_q == (1, 2, 1, 3, 1)
    assert plan.seqlens_k == (5, 5, 10, 3, 5)
    assert plan.full == (False, False, True, True, True)
    assert plan.cu_seqlens_q.tolist() == [0, 1, 3, 4, 7, 8]
    assert plan.cu_seqlens_k.tolist() == [0, 5, 10, 20, 23, 28]
    assert plan.kv_indices.tolist() == [
        *(200, 201, 202, 205, 206),
        *(200, 201, 202, 207, 208),
        *range(200, 210),
        *(0, 1, 2),
        *range(100, 105),
    ]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_any_integer_table(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    table = torch.arange(20, dtype=dtype).view(2, 10)
    keys = [(0, [(1, 3), (5, 6)]), (1, [(4, 4)]), (1, [(0, 2)])]
    rows = torch.tensor([1, 0]).to(index_dtype)
    cu_seqlens_q, cu_seqlens_k, slots = slot_lists([1, 2, 3], keys, table, rows)
    assert slots.tolist() == [11, 12, 15, 0, 1]
    assert slots.dtype == torch.int64
    assert cu_seqlens_q.tolist() == [0, 1, 3, 6]
    assert cu_seqlens_k.tolist() == [0, 3, 3, 5]


class Waits(TorchDispatchMode):
    """Records operators that make the host wait for a GPU, and copies to one."""

    WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "item", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        counts = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in self.WAITING or by_mask or counts:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_plan_is_one_upload_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are what kernels derive from it for their first layer."""
    uploads: list[torch.Tensor] = []
    original = types.upload
    monkeypatch.setattr(
        types, "upload", lambda host, device: uploads.append(host) or original(host, device)
    )
    prompt = write(5, Video((6,) * 9), 4)
    batch = make_batch([(prompt, 24, 39), (write(11), 0, 11)], sink=1, block=2)
    with Waits() as waits:
        plan = build_plan(batch.sequences, batch.req_to_token, batch.req_pool_indices)
        assert len(uploads) == 1
        token_table(plan.kv_indices, plan.cu_seqlens_k, plan.seqlens_k)
        assert len(uploads) == 1
        calls = calls_of(plan, Room(queries=1000, keys=1000, paged=True))
        assert len(uploads) == 2
    assert {call.table is None for call in calls} == {True, False}
    assert not waits.found
    plan.tiles(16)  # counted on the host
    assert len(uploads) == 3


def test_empty_batch() -> None:
    plan = build_plan([], torch.zeros(1, 4, dtype=torch.int32), torch.tensor([], dtype=torch.int64))
    assert (plan.num_seqs, plan.total_q, plan.max_seqlen_q, plan.max_seqlen_k) == (0, 0, 0, 0)
    assert plan.cu_seqlens_q.tolist() == [0]
    assert plan.kv_indices.shape == (0,)


@pytest.mark.parametrize(("prefix", "extend"), [([0, 0], [1]), ([0], [1]), ([0], [1, 1])])
def test_lists_of_different_length_are_refused(prefix: list[int], extend: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        virtual_sequences([Layout(), Layout()], prefix, extend)


def test_a_multimodal_request_without_a_layout_stops_the_server() -> None:
    """It came past the hook that lays requests out; full attention would be a lie."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from pevlm_sglang.attention.backend import read_batch

    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[5],
        extend_prefix_lens=None,
        extend_seq_lens=None,
        mm_inputs=[SimpleNamespace()],
    )
    with pytest.raises(RuntimeError, match="reached the forward without a layout"):
        read_batch(batch)
    batch.mm_inputs = [None]
    assert read_batch(batch) == ([TEXT], [0], [5])
