"""Every base backend under PEVLM, on SGLang's own attention test kit.

``torch_native`` and ``triton`` run their real kernels (Triton's under its interpreter). The others
run SGLang's real backends, pools and page sizes on emulated libraries, which read the rewritten
metadata, or PEVLM's plan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.base_cases import takes_fp8

TESTS = Path(__file__).parents[1]


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
    done = subprocess.run(
        [sys.executable, "-m", "support.base_cases", base, *kernels],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["taken"] == kernels
    assert summary["dense"] == dense
    assert (summary["planned"], summary["sparse"]) == (9 * len(kernels), 20 * len(kernels))
    narrow = [kernel for kernel in kernels.values() if takes_fp8(base, kernel)]
    assert summary["fp8"] == 2 * len(narrow)
    assert summary["unscaled"] == len(narrow) - (base == "flashinfer" and "base" in narrow)
    assert summary["max_error"] < 2e-5
