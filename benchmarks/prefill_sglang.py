"""The SGLang path of bench_llm_prefill.py: the language model's prefill inside a running server."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from serving import WORK_DIR, Client, Running, write_video

FPS = 2.0  # of the video, which is what SGLang samples: every frame is one
KINDS = {"full": False, "pevlm": True}
# Sampled frames, two a step of 299 tokens at this size: 2k to 100k tokens.
GPU_FRAMES, GPU_SIZE = (14, 28, 56, 110, 220, 440, 668), (644, 364)
CPU_FRAMES, CPU_SIZE = (8, 16, 32, 64, 128), (392, 280)  # 140 tokens a step


def rows(server: Running, frames: tuple[int, ...] | None, repeats: int) -> Iterator[dict[str, Any]]:
    """A row a length, as the Hugging Face path has it, from the server's own account.

    Args:
        frames: sampled of one long video, by the request's ``max_frames``.
        repeats: of each; medians.
    """
    on_gpu = torch.cuda.is_available()
    counts = frames or (GPU_FRAMES if on_gpu else CPU_FRAMES)
    client = Client(server.url)
    video = _video(max(counts), GPU_SIZE if on_gpu else CPU_SIZE)
    for pevlm in KINDS.values():  # kernels are compiled, memory is found
        client.split(video, pevlm=pevlm, max_frames=sorted(counts)[len(counts) // 2])
    for count in counts:
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(repeats):
            for kind, pevlm in KINDS.items():
                runs[kind].append(client.split(video, pevlm=pevlm, max_frames=count))
        length = runs["full"][0]["prompt_tokens"]
        saved = runs["pevlm"][0]["saved"]
        row: dict[str, Any] = {"length": length, "frames": count}
        row["visible_fraction"] = 1 - saved / (length * (length + 1) / 2)
        for kind, own in runs.items():
            attention = statistics.median(run["attention"] for run in own)
            other = statistics.median(run["other_prefill"] for run in own)
            row[kind] = {"attention_s": attention, "other_s": other, "total_s": attention + other}
        row["pevlm_sparse_calls"] = int(saved > 0)
        yield row


def _video(frames: int, size: tuple[int, int]) -> Path:
    path = WORK_DIR / f"{size[0]}x{size[1]}-{frames}.mp4"
    if not path.exists():
        write_video(path, seconds=frames / FPS, fps=FPS, size=size)
    return path
