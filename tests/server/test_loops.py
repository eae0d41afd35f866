"""Videos that come in stop nobody else's tokens: neither loop of a server works on pixels.

On a CPU the vision tower and the prefill of a video are the scheduler's own work; elsewhere they
are a GPU's. They are left out here: each video is sent once before, so that its tokens are in the
prefix cache. What is left is all that the launcher and the scheduler do for a video besides.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from support import loops
from support.broken_masks import plugin_path
from support.server import Server
from support.video import write_video

pytestmark = [pytest.mark.server, pytest.mark.slow]

VIDEOS = 8
FRAMES = 64
SIZE = (448, 336)  # 192 tokens a step of two frames, 115 MB of patches a video
PAUSE = 0.03
"""Seconds of the processor, of either loop. To hash, to copy or to unmap the patches of one video
takes a loop 0.03 to 0.06. The processor's time is measured, which other work on the machine leaves
alone; the test prints times by the wall, in which decoders share the cores with the model."""


@pytest.fixture(scope="module")
def server(
    model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    path = (plugin_path(tmp_path_factory.mktemp("plugin"), "loops"), os.environ.get("PYTHONPATH"))
    env = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    sampling = ("--mm-process-config", json.dumps({"video": {"nframes": FRAMES}}))
    memory = ("--max-total-tokens", "60000", "--enable-cache-report")
    flags = ("--attention-backend", "pevlm", *sampling, *memory)
    with Server(model("qwen2_5_vl"), *flags, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_video(folder / f"{seed}.mp4", seconds=FRAMES / 2, fps=2, size=SIZE, seed=seed)
        for seed in range(VIDEOS)
    ]


def ask(server: Server, video: Path) -> int:
    """Of a video's prompt, how many tokens were cached."""
    content = [
        {"type": "video_url", "video_url": {"url": str(video)}},
        {"type": "text", "text": "What happens?"},
    ]
    message = {"role": "user", "content": content}
    body = {"model": "tiny", "messages": [message], "max_tokens": 1, "temperature": 0}
    reply = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    details = reply.json()["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens", 0))


class Stream(threading.Thread):
    """Tokens of a text, and when each came."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.url, self.times, self.enough = server.url, list[float](), threading.Event()

    def run(self) -> None:
        params = {"max_new_tokens": 20_000, "ignore_eos": True, "temperature": 0}
        body = {"text": "Once upon a time", "sampling_params": params, "stream": True}
        with requests.post(f"{self.url}/generate", json=body, stream=True, timeout=300) as reply:
            for line in reply.iter_lines():
                if line:
                    self.times.append(time.perf_counter())
                if self.enough.is_set():
                    return

    def gaps(self, start: float, end: float) -> list[float]:
        within = [at for at in self.times if start <= at <= end]
        return [after - before for before, after in pairwise(within)]


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.info()["internal_states"][0]
    return found


def test_a_text_goes_on_beside_eight_videos(server: Server, videos: list[Path]) -> None:
    for video in videos:
        ask(server, video)
    stream = Stream(server)
    stream.start()
    cached: list[int] = []
    senders = [
        threading.Thread(target=lambda video=video: cached.append(ask(server, video)))
        for video in videos
    ]
    try:
        while len(stream.times) < 20:
            time.sleep(0.01)
        state(server)
        alone = time.perf_counter()
        time.sleep(2)
        quiet, began = state(server), time.perf_counter()
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        busy, ended = state(server), time.perf_counter()
    finally:
        stream.enough.set()
        stream.join()
    between = [sorted(stream.gaps(*times)) for times in ((alone, began), (began, ended))]
    print(
        f"{VIDEOS} videos in {ended - began:.2f} s; between tokens: "
        + "; ".join(f"{gaps[len(gaps) // 2]:.4f} s, at most {gaps[-1]:.4f} s" for gaps in between)
        + f"; {quiet[loops.KEY]} {busy[loops.KEY]}; {cached}"
    )
    assert min(cached) > 6000
    assert len(cached) == VIDEOS
    assert busy["pevlm"]["vision_runs"] == quiet["pevlm"]["vision_runs"]
    assert max(busy[loops.KEY].values()) < PAUSE
