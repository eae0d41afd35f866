"""Run a module of the tests in a process of its own: SGLang's global state does not go away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.server import DEFAULT_ENV

TESTS = Path(__file__).resolve().parent.parent


INTERPRETED = {"TRITON_INTERPRET": "1"}
"""Triton's kernels in Python; has to be chosen before triton is imported."""


def run_module(name: str, *arguments: str, env: Mapping[str, str] = DEFAULT_ENV) -> str:
    """``python -m name arguments…`` in the tests' folder, for ten minutes at most.

    Args:
        env: on top of this process's own; by default that of a test server.

    Returns:
        What it wrote to stdout.

    Raises:
        AssertionError: with the end of what it wrote, where it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=TESTS,  # where `support` lies
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout
