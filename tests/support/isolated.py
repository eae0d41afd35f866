"""Run a module of the tests in a process of its own: SGLang's global state does not go away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.server import DEFAULT_ENV

TESTS = Path(__file__).resolve().parent.parent


def run_module(name: str, *arguments: str) -> None:
    """``python -m name arguments…`` with the environment of a test server.

    Raises:
        AssertionError: with the end of what it wrote, where it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=TESTS,  # where `support` lies
        env={**os.environ, **DEFAULT_ENV},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
