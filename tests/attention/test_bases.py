"""Every base backend under PEVLM, on SGLang's own attention test kit.

``torch_native`` and ``triton`` run their real kernels (Triton's under its interpreter). The others
run SGLang's real backends, pools and page sizes on emulated libraries, which read the rewritten
metadata, or PEVLM's plan.
"""

from __future__ import annotations

import json

import pytest

from support.base_cases import takes_fp8
from support.isolated import INTERPRETED, run_module

# Base → dense cases of SGLang's kit (decode of the emulated ones is not run), and what is taken for
# each --pevlm-prefill-kernel.
CASES = {
    "torch_native": (12, {"auto": "sdpa", "triton": "triton"}),
    "triton": (12, {"auto": "triton", "base": "base", "sdpa": "sdpa"}),
    "fa3": (9, {"base": "base", "flash": "flash"}),
    "fa4": (9, {"auto": "flash", "sdpa": "sdpa"}),
    "flashinfer": (9, {"auto": "base", "flash": "flash", "sdpa": "sdpa"}),
    "trtllm_mha": (9, {"auto": "flash", "sdpa": "sdpa"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("base", CASES)
def test_base_backend(base: str) -> None:
    """All cases ran, none skipped, to fp32 rounding."""
    dense, kernels = CASES[base]
    written = run_module("support.base_cases", base, *kernels, env=INTERPRETED)
    summary = json.loads(written.splitlines()[-1])
    assert summary["taken"] == kernels
    assert summary["dense"] == dense
    assert (summary["planned"], summary["sparse"]) == (9 * len(kernels), 20 * len(kernels))
    narrow = [kernel for kernel in kernels.values() if takes_fp8(base, kernel)]
    assert summary["fp8"] == 2 * len(narrow)
    assert summary["unscaled"] == len(narrow) - (base == "flashinfer" and "base" in narrow)
    assert summary["max_error"] < 2e-5
