"""The Triton kernel, compiled ahead of time on a machine without a GPU: does it build and fit?"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pevlm_kernels.triton_kernels import attend  # noqa: E402
from pevlm_kernels.triton_prefill import (  # noqa: E402
    LARGE_BYTES,
    SMALL_BYTES,
    Tiling,
    candidates,
    constants,
)

# Shared memory of a program on the smallest GPU that runs code for this architecture.
SMALLEST = {80: SMALL_BYTES, 90: LARGE_BYTES, 100: LARGE_BYTES}
WIDTHS = (64, 80, 96, 128, 256)
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


def compiled(
    architecture: int,
    width: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    sizes: Tiling,
) -> object:
    """The kernel as :func:`pevlm_kernels.triton_prefill.prefill` specialises it for aligned tensors
    with seven query heads for each key-value head."""
    constexprs = constants(7, width, width, sizes)
    types = dict.fromkeys(constexprs, "constexpr")
    types |= {name: "i32" for name in attend.arg_names if name.startswith("stride")}
    types |= dict.fromkeys(("q_ptr", "out_ptr"), f"*{NAMES[dtype]}")
    types |= dict.fromkeys(("k_ptr", "v_ptr"), f"*{NAMES[cache_dtype]}")
    types |= dict.fromkeys(("tiles_ptr", "cu_q_ptr", "cu_k_ptr"), "*i32")
    types |= {"slots_ptr": "*i64", "lse_ptr": "*fp32"}
    types |= {"scale_log2": "fp32", "v_scale": "fp32"}
    aligned = [n for n in attend.arg_names if n.endswith("_ptr") or n.startswith("stride")]
    source = ASTSource(
        attend,
        {name: types[name] for name in attend.arg_names},
        constexprs={(attend.arg_names.index(name),): value for name, value in constexprs.items()},
        attrs={(attend.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": sizes.num_warps, "num_stages": sizes.num_stages},
    )


CASES = [
    *((width, dtype, dtype) for width in WIDTHS for dtype in (torch.bfloat16, torch.float32)),
    (128, torch.float16, torch.float16),
    (128, torch.bfloat16, torch.float8_e5m2),
    (128, torch.bfloat16, torch.float8_e4m3fn),
]


@pytest.mark.parametrize(
    ("architecture", "width", "dtype", "cache_dtype"),
    [
        (architecture, *case)
        for architecture in SMALLEST
        for case in CASES
        if architecture > 80 or torch.float8_e4m3fn not in case  # which sm_80 does not know
    ],
)
def test_compiles_and_fits(
    architecture: int,
    width: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> None:
    limit = SMALLEST[architecture]
    for sizes in candidates(width, dtype, limit):
        kernel = compiled(architecture, width, dtype, cache_dtype, sizes)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= limit, sizes
