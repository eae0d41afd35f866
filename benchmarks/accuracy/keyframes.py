"""What the small model's accuracy loses where keyframes take the place of sampled frames.

    python benchmarks/accuracy/keyframes.py [--videos N] [--out FILE]

Method. Held-out videos as files of sixteen frames a second, of which two a second are sampled: once
exactly, once with the nearest keyframe in the place of each that has one near. The videos are cut
every second, and a picture is shown for half a second. ``anywhere``: a keyframe every 7 frames, up
to 3.5 frames from a sampled one, so that a fifth of them show the picture before or after the one
that was sampled. ``at cuts``: a keyframe where a scene begins. The same questions, under full
attention and under PEVLM's mask with 16 and 16 frames; an interval is over videos.

Figures: benchmarks/results/accuracy-keyframes.json, in docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from accuracy.dataset import ANYWHERE, AT_CUTS, HELD_OUT, HELD_OUT_SCENES, make_clip  # noqa: E402
from accuracy.evaluate import BLOCK_STEPS, BLOCK_TOKENS, SINK_STEPS  # noqa: E402
from accuracy.methods import full, pevlm  # noqa: E402
from accuracy.reader import Reader  # noqa: E402
from machine import card, one_thread, summary, write_json  # noqa: E402

from pevlm_sglang.families.qwen_vl.sizes import PUBLISHED  # noqa: E402
from pevlm_sglang.families.qwen_vl.video import (  # noqa: E402
    Patcher,
    clip_buffer,
    normalization,
    sample,
)
from pevlm_sglang.media.clips import new  # noqa: E402
from pevlm_sglang.media.wishes import Wishes  # noqa: E402

MODEL = Path(__file__).parent / "model"
GEOMETRY = PUBLISHED["qwen2_5_vl"]
EACH = 3  # questions a task and video
WAYS = {"exact": Wishes(), "keyframes": Wishes(frames="keyframes")}


def see(reader: Reader, path: Path, wish: Wishes) -> tuple[torch.Tensor, list[int]]:
    """The vision tower's features of a file, and the frames that were taken."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    video = VideoDecoderWrapper(str(path))
    sampled = sample(video, GEOMETRY, GEOMETRY.settings({"min_pixels": 3136}), wish)
    grid = sampled.grid(GEOMETRY)
    buffer = clip_buffer(sampled, GEOMETRY, torch.float32, grid[0], new)
    norm = normalization(reader.processor.video_processor)
    frames = torch.as_tensor(video.get_frames_at(sampled.indices))
    Patcher(buffer, sampled, GEOMETRY, norm, exact=False)(0, frames)
    (clip,) = buffer.clips()
    with torch.no_grad():
        out = reader.model.model.visual(clip.pixels, torch.tensor([grid]), return_dict=True)
    features: torch.Tensor = out.pooler_output
    return features, sampled.indices


def compare(videos: int, group: int) -> dict[str, Any]:
    """Answers about as many videos of each length, with a keyframe every ``group`` frames."""
    reader = Reader(MODEL)
    methods = {
        "full": full,
        "pevlm": pevlm(sink_steps=SINK_STEPS, block_steps=BLOCK_STEPS, block_tokens=BLOCK_TOKENS),
    }
    scores: dict[str, dict[str, list[float]]] = {
        name: {way: [] for way in WAYS} for name in methods
    }
    asked: list[int] = []
    moved: list[int] = []
    with tempfile.TemporaryDirectory() as work:
        for scenes in HELD_OUT_SCENES:
            for number in range(videos):
                clip = make_clip(HELD_OUT, scenes, number, EACH)
                path = clip.write_keyed(Path(work), group)
                seen = {way: see(reader, path, wish) for way, wish in WAYS.items()}
                moved += [
                    abs(one - other)
                    for one, other in zip(seen["exact"][1], seen["keyframes"][1], strict=True)
                ]
                asked.append(len(clip.questions))
                for name, method in methods.items():
                    for way, (features, _) in seen.items():
                        right = reader.right(features, clip.questions, method)
                        scores[name][way].append(sum(right))
    return {
        "videos": len(asked),
        "questions": sum(asked),
        "frames_moved": sum(moved) / len(moved),
        "methods": {
            name: {
                **{way: sum(right) / sum(asked) for way, right in ways.items()},
                **_difference(ways["keyframes"], ways["exact"], asked),
            }
            for name, ways in scores.items()
        },
    }


def _difference(these: list[float], those: list[float], asked: list[int]) -> dict[str, float]:
    """Of two shares, and half of its 95 % interval."""
    gained, number = np.subtract(these, those), np.array(asked)
    mean = gained.sum() / number.sum()
    rest = (gained - number * mean) / number.sum()
    error = float(np.sqrt((rest**2).sum() * len(asked) / max(1, len(asked) - 1)))
    return {"difference": float(mean), "half_width": 1.96 * error}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=50, help="of each length")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    one_thread()
    machine = card(torch.device("cpu"))
    print(summary(machine), flush=True)
    result: dict[str, Any] = {"card": machine}
    for place, group in (("anywhere", ANYWHERE), ("at cuts", AT_CUTS)):
        found = result[place] = compare(options.videos, group)
        print(
            f"{place}: {found['videos']} videos, {found['questions']} questions; frames moved by "
            f"{found['frames_moved']:.2f} of sixteen a second in the mean"
        )
        for name, shares in found["methods"].items():
            print(
                f"  {name:>8}: exact {100 * shares['exact']:.2f} %, keyframes "
                f"{100 * shares['keyframes']:.2f} %, difference "
                f"{100 * shares['difference']:+.2f} ± {100 * shares['half_width']:.2f} points",
                flush=True,
            )
        write_json(options.out, result)


if __name__ == "__main__":
    main()
