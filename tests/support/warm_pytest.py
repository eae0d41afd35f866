"""pytest in forks of a process that has the slow imports behind it: for each line of arguments, a
JSON list, it prints ``exit`` and pytest's code. What is tested itself is imported in the fork."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from contextlib import suppress

import pytest

SLOW = (
    "hypothesis",
    "torch",
    "transformers",
    "sglang.srt.managers.schedule_batch",
    "sglang.srt.multimodal.processors.base_processor",
)
TIMEOUT_S = 600  # of one run


def main() -> None:
    for name in SLOW:
        with suppress(ImportError):  # tests without SGLang run without it
            importlib.import_module(name)
    for line in sys.stdin:
        if not (child := os.fork()):
            _run(json.loads(line))
        status = os.waitpid(child, 0)[1]
        with suppress(ProcessLookupError):  # what its tests have started
            os.killpg(child, signal.SIGKILL)
        print("exit", os.waitstatus_to_exitcode(status), flush=True)


def _run(arguments: list[str]) -> None:
    os.setsid()
    signal.alarm(TIMEOUT_S)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    code = 3  # pytest's own for a fault of its own
    with suppress(BaseException):
        code = int(pytest.main(arguments))
    os._exit(code)


if __name__ == "__main__":
    main()
