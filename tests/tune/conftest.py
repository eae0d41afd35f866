"""A fake server, questions about two videos, and ``pevlm tune`` between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer

from pevlm_sglang.tools.cli import main
from support.fake_server import FakeServer

COLOURS = ("red", "green", "blue")
SIZES = ["--sink-frames", "2", "4", "--block-frames", "4", "8"]


@pytest.fixture
def server(httpserver_ipv4: HTTPServer) -> FakeServer:
    fake = FakeServer(httpserver_ipv4)
    fake.delays[None] = 0.05
    return fake


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Lines into a file beside ``a.mp4`` and ``b.mp4``."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(name.encode())

    def written(*lines: Any, name: str = "questions.jsonl") -> Path:
        path = tmp_path / name
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("\n".join(texts) + "\n")
        return path

    return written


@pytest.fixture
def questions(write: Callable[..., Path]) -> Path:
    return write(
        *(
            {"video": video, "question": f"Say {colour}", "answer": colour.upper(), "task": 7}
            for video in ("a.mp4", "b.mp4")
            for colour in COLOURS
        )
    )


@pytest.fixture
def run(server: FakeServer, tmp_path: Path) -> Callable[..., int]:
    def called(questions: Path, *flags: str, latency: str = "10", sizes: Any = SIZES) -> int:
        output = ["--output", str(tmp_path / "out")]
        where = ["--url", server.url, *output, "--latency", latency]
        return main(["tune", str(questions), *where, *sizes, *flags])

    return called
