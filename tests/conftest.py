"""Settings of all tests."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: a first example that compiles or a busy machine is no failure. Every run draws new
# examples; the blob in a failure's output replays it. `fast` is for the inner loop, make check.
settings.register_profile(
    "default",
    max_examples=200,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fast", settings.get_profile("default"), max_examples=25)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seconds", type=float, default=120, help="of tests/server/test_soak.py")
    parser.addoption("--fuzz-files", type=int, default=300, help="of tests/media/test_fuzz.py")
    parser.addoption("--fuzz-requests", type=int, default=100, help="of tests/server/test_fuzz.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
