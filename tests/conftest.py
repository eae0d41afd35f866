"""Settings of all tests."""

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
