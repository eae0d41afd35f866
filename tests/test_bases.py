"""Every base backend under PEVLM, on SGLang's own attention test kit.

``torch_native`` and ``triton`` run their real kernels (Triton's under its interpreter).
FlashAttention-3 and FlashInfer run SGLang's real backend on emulated libraries, which read the
rewritten metadata.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("base", "dense"), [("torch_native", 12), ("triton", 12), ("fa3", 9), ("flashinfer", 9)]
)
def test_base_backend(base: str, dense: int) -> None:
    """All cases ran, none skipped, to fp32 rounding. (Decode of the emulated ones is not run.)"""
    done = subprocess.run(
        [sys.executable, "-m", "support.base_cases", base],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["dense"], summary["planned"], summary["sparse"]) == (dense, 9, 20)
    assert summary["max_error"] < 2e-5
