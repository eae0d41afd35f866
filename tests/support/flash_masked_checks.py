"""FlashAttention-4 itself on a machine without a GPU: ``python -m support.flash_masked_checks 9``.

The mask function runs on the CPU, where CuTe compiles it too, over all scores of a layout. Then the
library's own interface compiles its block-sparse kernel with it, from tensors that are none
(PyTorch's fake ones), for GPUs of a major compute capability. The variables that make the library
compile for another machine than this one are set by test_flash_masked.py.
"""

import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from flash_attn.cute import interface, utils
from torch._subclasses.fake_tensor import FakeTensorMode

from pevlm_kernels import flash_masked, packed_plan

LENGTH, SINK_END = 317, 63
BLOCKS = ((63, 64), (64, 127), (127, 238), (238, 239), (239, 303))
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 28, 4, 128


@cute.jit
def every_score(seen: cute.Tensor, past: cute.Tensor, own: cute.Tensor):  # type: ignore[no-untyped-def]
    zero = utils.scalar_to_ssa(0, cutlass.Int32)
    for i in range(LENGTH):
        for j in range(LENGTH):
            q = utils.scalar_to_ssa(i, cutlass.Int32)
            k = utils.scalar_to_ssa(j, cutlass.Int32)
            value = flash_masked.load().mask_mod(zero, zero, q, k, None, [past, own])
            seen[i, j] = cutlass.Int32(cutlass.Boolean(utils.ssa_to_scalar(value)))


def check_mask() -> None:
    """The real function against equations (2) to (4) of the paper."""
    past, own = flash_masked.keys_of_rows(plan(), 128)
    found = torch.full((LENGTH, LENGTH), -1, dtype=torch.int32)
    every_score(*map(from_dlpack, (found, past, own)))
    expected = torch.ones(LENGTH, LENGTH, dtype=torch.int32).tril()
    for start, end in BLOCKS:
        expected[start:end, SINK_END:start] = 0
    assert torch.equal(found, expected)


def check_kernel(major: int) -> None:
    """Compile the kernel for GPUs of a major compute capability, through the adapter."""
    call = plan()
    block_q = flash_masked.BLOCK_Q[major]
    past, own = flash_masked.keys_of_rows(call, block_q)
    blocks = flash_masked.blocks_of(past, own, LENGTH, block_q)
    compiled = interface._flash_attn_fwd.compile_cache.cache
    before = len(compiled)
    with pretend_gpu(major), FakeTensorMode(), torch.device("cuda"):
        call.memo["flash_masked"] = fake(past), fake(own), [fake(part) for part in blocks]
        q = torch.empty(LENGTH, NUM_Q_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        k, v = (torch.empty(LENGTH, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
        out, lse = flash_masked.prefill(q, k, v, call, softmax_scale=0.1, v_scale=1.0)
    assert (out.shape, lse.shape) == (q.shape, (NUM_Q_HEADS, LENGTH))
    assert len(compiled) == before + 1, "nothing was compiled"


def pretend_gpu(major: int) -> ExitStack:
    """Answers to what adapter and library ask the driver; the number of processors sizes a grid."""
    stack = ExitStack()
    hardware = cutlass.utils.HardwareInfo
    for owner, name, value in (
        (torch.cuda, "get_device_capability", (major, 0)),
        (hardware, "__init__", None),
        (hardware, "get_device_multiprocessor_count", 132),
    ):
        stack.enter_context(mock.patch.object(owner, name, return_value=value))
    return stack


def plan() -> Any:
    return packed_plan(LENGTH, SINK_END, BLOCKS, torch.device("cpu"))


def fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


if __name__ == "__main__":
    check_mask()
    check_kernel(int(sys.argv[1]))
