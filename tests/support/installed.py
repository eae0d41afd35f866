"""What ``.ci/wheel`` runs where the wheel is installed and the checkout is out of sight.

It reads what the wheel says about itself, and starts a server under a preset that came with it.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from support.server import Server
from support.tiny import make_tiny_model
from support.video import write_video

FLAGS = (
    *("--attention-backend", "pevlm", "--pevlm-config", "low-latency"),
    *("--mm-process-config", '{"video": {"min_pixels": 3136}}'),  # 12 tokens a step
)


def main() -> None:
    for name in ("pevlm_sglang", "pevlm_kernels", "pevlm_cpu"):
        file = str(import_module(name).__file__)
        expect(file.startswith(sys.prefix), f"{name} in {sys.prefix}", file)
    described = metadata("pevlm-sglang")
    version = import_module("pevlm_sglang").__version__
    expect(described["Version"] == version, f"version {version}", described["Version"])
    for field in ("License-Expression", "License-File", "Project-URL", "Classifier"):
        expect(field in described, field, list(described))
    with tempfile.TemporaryDirectory() as directory:
        serve(Path(directory))
    print("wheel: a server under a packaged preset answered about a video")


def serve(directory: Path) -> None:
    """One question about 40 sampled frames, of which the preset's sink and first block hold 18."""
    clip = write_video(directory / "clip.mp4", seconds=20, size=(112, 84))
    content: list[dict[str, Any]] = [
        {"type": "video_url", "video_url": {"url": str(clip)}},
        {"type": "text", "text": "What happens in the video?"},
    ]
    with Server(make_tiny_model(directory / "model"), *FLAGS) as server:
        tokens = server.chat(content)["usage"]["completion_tokens"]
        info = server.info()
    expect(tokens > 0, "an answer", tokens)
    config = info["pevlm"]
    expect((config["sink_frames"], config["block_frames"]) == (2, 16), "low-latency", config)
    totals = info["internal_states"][0]["pevlm"]
    expect(totals["sparse_tokens"] > 0, "sparse tokens", totals)


def expect(holds: bool, expected: str, got: Any) -> None:
    """
    Raises:
        SystemExit: what was expected does not hold.
    """
    if not holds:
        raise SystemExit(f"wheel: expected {expected}, got {got}")


if __name__ == "__main__":
    main()
