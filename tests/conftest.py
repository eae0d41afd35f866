"""Settings of all tests."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: a first example that compiles or a busy machine is no failure. Every run draws new
# examples; the blob in a failure's output replays it.
settings.register_profile(
    "default",
    max_examples=200,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
