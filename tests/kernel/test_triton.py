"""The Triton kernel under its interpreter: all of test_implementations.py and test_packed.py again,
in a process of its own, since the interpreter has to be chosen before triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "at_least"), [("test_implementations.py", 80), ("test_packed.py", 20)]
)
def test_under_the_interpreter(file: str, at_least: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", file, "-k", "triton"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout[-500:]
    assert int(found[1]) >= at_least, "cases went missing"
