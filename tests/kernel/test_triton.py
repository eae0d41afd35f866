"""The Triton kernel under its interpreter: all of test_implementations.py and test_packed.py again,
in a process of its own, since the interpreter has to be chosen before triton is imported."""

from __future__ import annotations

import re

import pytest

from support.isolated import INTERPRETED, run_module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "at_least"), [("test_implementations.py", 80), ("test_packed.py", 20)]
)
def test_under_the_interpreter(file: str, at_least: int) -> None:
    options = ("-xq", "-p", "no:cacheprovider", "-k", "triton")
    written = run_module("pytest", *options, f"kernel/{file}", env=INTERPRETED)
    found = re.search(r"(\d+) passed", written)
    assert found, written[-500:]
    assert int(found[1]) >= at_least, "cases went missing"
