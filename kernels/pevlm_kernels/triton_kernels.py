"""An own Triton kernel over virtual sequences: any NVIDIA GPU from Ampere to Blackwell.

One program computes ``BLOCK_M`` queries of one head. It walks its keys once, in one online softmax
(FlashAttention-2, arXiv 2307.08691, algorithm 1): first the tiles that every query of the program
sees, without a mask, then the few on the diagonal. The sink and the block follow each other in a
virtual sequence's list of cache slots, so they are one walk, wherever they lie.

This module and ``triton_prefill`` are loaded when the door is asked for them: a kernel has to stand
below ``import triton``, and its arguments carry no types but ``tl.constexpr``.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    cu_q_ptr,
    cu_k_ptr,
    slots_ptr,
    scale_log2,
    v_scale,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    stride_o,
    stride_oh,
    stride_lse,
    GROUP: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM_V: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    BLOCK_DV: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
):
    # A cache may hold more than 2**31 elements, and so may q: all addresses are 64 bits wide.
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    seq = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)  # query of the sequence
    q_start = tl.load(cu_q_ptr + seq)
    k_start = tl.load(cu_k_ptr + seq)
    num_q = tl.load(cu_q_ptr + seq + 1) - q_start
    num_k = tl.load(cu_k_ptr + seq + 1) - k_start
    before = num_k - num_q  # keys before the first query's own
    slots_ptr += k_start

    rows = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_rows = q_start.to(tl.int64) + rows
    q = tl.load(
        q_ptr + q_rows[:, None] * stride_q + head * stride_qh + dims[None, :],
        mask=(rows < num_q)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    k_head = k_ptr + (head // GROUP) * stride_kh
    v_head = v_ptr + (head // GROUP) * stride_vh

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    # Every query of the program sees the keys up to the first one's own.
    unmasked = (before + first + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(before + first + BLOCK_M, num_k)
    for start in range(0, unmasked, BLOCK_N):
        acc, total, largest = attend_to_tile(
            q, acc, total, largest, k_head, v_head, slots_ptr, start, before + rows, num_k,
            scale_log2, stride_k, stride_v,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, False,
        )  # fmt: skip
    for start in range(unmasked, end, BLOCK_N):
        acc, total, largest = attend_to_tile(
            q, acc, total, largest, k_head, v_head, slots_ptr, start, before + rows, num_k,
            scale_log2, stride_k, stride_v,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, True,
        )  # fmt: skip

    valid = rows < num_q
    tl.store(
        out_ptr + q_rows[:, None] * stride_o + head * stride_oh + dims_v[None, :],
        (acc * (v_scale / total)[:, None]).to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims_v < HEAD_DIM_V)[None, :],
    )
    # Natural logarithm: ln 2 * (log2 of the sum).
    tl.store(
        lse_ptr + head * stride_lse + q_rows,
        (largest + tl.log2(total)) * 0.6931471805599453,
        mask=valid,
    )


@triton.jit
def attend_to_tile(
    q,
    acc,
    total,
    largest,
    k_head,
    v_head,
    slots_ptr,
    start,
    last_keys,  # of each query, itself included
    num_k,
    scale_log2,
    stride_k,
    stride_v,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM_V: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    BLOCK_DV: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    ON_DIAGONAL: tl.constexpr,  # noqa: N803
):
    """One step of the online softmax: keys ``[start, start + BLOCK_N)`` of the sequence."""
    keys = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    exists = keys < num_k
    if ON_DIAGONAL:
        slots = tl.load(slots_ptr + keys, mask=exists, other=0)
    else:
        slots = tl.load(slots_ptr + keys)
    k_mask = (dims < HEAD_DIM)[:, None]
    v_mask = (dims_v < HEAD_DIM_V)[None, :]
    if ON_DIAGONAL:
        k_mask = k_mask & exists[None, :]
        v_mask = v_mask & exists[:, None]
    k = tl.load(k_head + slots[None, :] * stride_k + dims[:, None], mask=k_mask, other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
    if ON_DIAGONAL:
        scores = tl.where(keys[None, :] <= last_keys[:, None], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    v = tl.load(v_head + slots[:, None] * stride_v + dims_v[None, :], mask=v_mask, other=0.0)
    v = v.to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(weights, 1), new_largest
