"""What tests, benchmarks and the demo share: a tiny model, a video file, a real server."""
