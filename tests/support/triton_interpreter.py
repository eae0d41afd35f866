"""Triton's interpreter, made to compute bf16 as a GPU does.

Triton 3.8's interpreter keeps bf16 as bit patterns in uint16. Its ``dot`` multiplies the patterns
themselves, and its cast from fp32 cuts digits off where a GPU rounds to nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def fix_bfloat16() -> None:
    """Patch the interpreter of this process; call once, with TRITON_INTERPRET=1."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = torch.from_numpy(np.ascontiguousarray(operand.data))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)
