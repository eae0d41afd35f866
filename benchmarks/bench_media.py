"""From a video file to the scheduler's input: PEVLM's media path, SGLang's, and qwen-vl-utils'.

    python benchmarks/bench_media.py [--out FILE] [--only NAME ...] [--repeats N]

Method. Files are made on the spot: codec, size, length and distance of keyframes. Each of these
reads each file in a process of its own, for Qwen2.5-VL at at most 768 frames of 644 x 336:

- ``decode``: torchcodec alone, one thread, 32 frames at a time: the sampled frames are decoded,
  and thrown away. The measure of all others.
- ``pevlm``, ``float32``: this plugin's processor, with either resize. Patches, tokens, hash.
- ``sglang``: SGLang's processor, and the hash that its scheduler computes.
- ``qwen-vl-utils``: its reader and resize, and transformers' processor.
- ``keyframes``: as ``pevlm``, for a request that wishes for ``"frames": "keyframes"``; of files of
  an hour, which are read so and by ``pevlm`` alone.

Reported: seconds by the wall and of the processors (all threads), and the largest memory beyond
that of the process before it began, as a multiple of the result (the vision tower's input, fp32);
of the repeats, the one with the fewest seconds. Other work on the machine blurs the wall's.

No figure without a green gate: ``float32``'s patches must equal qwen-vl-utils' to the bit, and
``pevlm``'s those with transformers' own resize in its place, on the same file. Keyframes are other
frames; tests/media/test_slices.py compares them with those of a decoder that reads the whole file.

Figures: benchmarks/results/media-cpu.json, of an hour media-keyframes-cpu.json; in tables
docs/performance.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from machine import card, summary, write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # `support` lives there

WORK_DIR = ROOT / ".cache" / "bench_media"
SETTINGS: dict[str, Any] = {"max_frames": 768, "max_pixels": 644 * 336}
PROMPT = "<|vision_start|><|video_pad|><|vision_end|>What happens?"
WAYS = ("decode", "pevlm", "float32", "sglang", "qwen-vl-utils")
HOUR, HOURS_WAYS = 3600, ("pevlm", "keyframes")


@dataclass(frozen=True)
class File:
    """A video; ``group`` is the distance of its keyframes."""

    codec: str
    size: tuple[int, int]
    seconds: int
    group: int
    fps: int = 25

    @property
    def name(self) -> str:
        width, height = self.size
        return f"{self.codec}-{width}x{height}-{self.seconds}s-{self.group}"

    def write(self, directory: Path) -> Path:
        """Moving patterns over noise; of an hour, the same minute again and again."""
        path = directory / f"{self.name}.mp4"
        if path.exists():
            return path
        if self.seconds == HOUR:
            minute = replace(self, seconds=60).write(directory)
            repeated = path.with_suffix(".txt")
            repeated.write_text(f"file '{minute}'\n" * (self.seconds // 60))
            words = ["ffmpeg", "-v", "error", "-y", "-f", "concat", "-safe", "0"]
            subprocess.run([*words, "-i", str(repeated), "-c", "copy", str(path)], check=True)
            return path
        width, height = self.size
        source = f"testsrc2=size={width}x{height}:rate={self.fps}:duration={self.seconds}"
        options = ["-vf", "noise=alls=6:allf=t", "-g", str(self.group), "-pix_fmt", "yuv420p"]
        if self.codec == "libx264":
            options += ["-preset", "veryfast", "-crf", "28", "-sc_threshold", "0"]
        if self.codec == "libx265":
            options += ["-preset", "ultrafast", "-crf", "30", "-x265-params", "log-level=none"]
        if self.codec == "libvpx-vp9":
            options += ["-deadline", "realtime", "-cpu-used", "8", "-b:v", "2M"]
        directory.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.mp4")
        words = ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", source]
        subprocess.run([*words, "-c:v", self.codec, *options, str(part)], check=True)
        part.rename(path)
        return path


FILES = (
    File("libx264", (1280, 720), 900, 250),
    File("libx264", (1280, 720), 120, 250),
    File("libx264", (1280, 720), 120, 100_000),
    File("libx264", (640, 360), 120, 250),
    File("libx264", (3840, 2160), 40, 50),
    File("libx265", (1280, 720), 120, 250),
    File("libvpx-vp9", (1280, 720), 120, 250),
    File("libx264", (1280, 720), HOUR, 250),
    File("libx264", (1280, 720), HOUR, 100),
)


@dataclass(frozen=True)
class Figures:
    """One file, one way.

    Attributes:
        wall_s, cpu_s: of the repeat with the fewest processor seconds.
        peak_bytes: of memory beyond that of the process before.
        result_bytes: of the vision tower's input; 0 where there is none.
        stages: seconds by stage, where the way says.
        digest: of the vision tower's input.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    result_bytes: int
    stages: dict[str, float]
    digest: str | None


class Peak:
    """The largest resident memory of this process during a block."""

    def __enter__(self) -> Peak:
        self._done, self.bytes = Event(), 0
        self._before = _resident()
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, _resident() - self._before)

    def __exit__(self, *args: Any) -> None:
        self._done.set()
        self._thread.join()


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Decode:
    """torchcodec alone."""

    def __init__(self, stack: ExitStack, model: Path) -> None: ...

    def __call__(self, path: Path) -> list[torch.Tensor]:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(path, dimension_order="NHWC")
        total, fps = len(decoder), decoder.metadata.average_fps or 0
        count = int(min(total / fps * 2, SETTINGS["max_frames"], total)) // 2 * 2
        indices = torch.linspace(0, total - 1, count).round().long().tolist()
        for start in range(0, count, 32):
            decoder.get_frames_at(indices[start : start + 32])
        return []


class Plugin:
    """A processor as SGLang's launcher has it."""

    resize: str | None = "uint8"
    wishes: Mapping[str, Any] = {}

    def __init__(self, stack: ExitStack, model: Path) -> None:
        import transformers
        from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
        from sglang.srt.utils.hf_transformers.processor import get_processor

        from pevlm_sglang.families.qwen_vl.processor import QwenVLProcessor
        from support.processor import sglang_processor

        self._processor = stack.enter_context(
            sglang_processor(
                QwenVLProcessor if self.resize else QwenVLImageProcessor,
                transformers.AutoConfig.from_pretrained(model),
                get_processor(str(model)),
                video=SETTINGS,
                pevlm={"video_resize": self.resize, "media_cache_mb": 0} if self.resize else {},
            )
        )

    def __call__(self, path: Path) -> list[torch.Tensor]:
        output = self._processor(PROMPT, [{"url": str(path), **self.wishes}])
        for item in output.mm_items:
            item.set_pad_value()  # the scheduler's hash, where it has none yet
        return [item.feature for item in output.mm_items]


class Keyframes(Plugin):
    wishes = {"frames": "keyframes"}  # noqa: RUF012


class Float32(Plugin):
    resize = "float32"


class SGLang(Plugin):
    resize = None


class Reference:
    """qwen-vl-utils and transformers."""

    resize = "float32"

    def __init__(self, stack: ExitStack, model: Path) -> None:
        from transformers import AutoProcessor

        os.environ["FORCE_QWENVL_VIDEO_READER"] = "torchcodec"
        self._processor = AutoProcessor.from_pretrained(model)

    def __call__(self, path: Path) -> list[torch.Tensor]:
        from support.families.qwen_vl import reference_inputs, reference_video

        clip = reference_video(path, SETTINGS, resize=self.resize)
        inputs = reference_inputs(self._processor, PROMPT, [clip])
        return [inputs["pixel_values_videos"]]


class OfTransformers(Reference):
    """With the resize of transformers' own video processors."""

    resize = "uint8"


MADE: dict[str, Callable[[ExitStack, Path], Callable[[Path], Any]]] = {
    "decode": Decode,
    "pevlm": Plugin,
    "keyframes": Keyframes,
    "float32": Float32,
    "sglang": SGLang,
    "qwen-vl-utils": Reference,
    "transformers": OfTransformers,
}


def measure(way: str, path: Path, model: Path, repeats: int) -> Figures:
    """In this process, which has done nothing else."""
    from pevlm_sglang.media import stages

    best: Figures | None = None
    with ExitStack() as stack:
        read = MADE[way](stack, model)
        read(_warm_up())
        for _ in range(repeats):
            result: list[torch.Tensor] = []  # the last one's memory goes first
            stages._current.set(None)
            split = stages.begin()
            with Peak() as peak:
                began, used = time.perf_counter(), time.process_time()
                result = read(path)
                wall, cpu = time.perf_counter() - began, time.process_time() - used
            size = sum(part.nbytes for part in result)
            digest = content(result) if result else None
            figures = Figures(wall, cpu, peak.bytes, size, split.seconds, digest)
            if best is None or figures.cpu_s < best.cpu_s:
                best = figures
    assert best is not None
    return best


def content(parts: list[torch.Tensor]) -> str:
    """A digest of the vision tower's input, however it is cut."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _warm_up() -> Path:
    return File("libx264", (320, 180), 4, 50).write(WORK_DIR)


def apart(way: str, path: Path, model: Path, repeats: int) -> Figures:
    """In a process of its own."""
    words = [sys.executable, __file__, "--one", way, str(path), str(model)]
    done = subprocess.run(
        [*words, "--repeats", str(repeats)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def gate(found: dict[str, Figures], path: Path, model: Path) -> None:
    """End here unless the same pixels came out."""
    fast = apart("transformers", path, model, 1)
    for name, expected in (("float32", found["qwen-vl-utils"]), ("pevlm", fast)):
        if found[name].digest != expected.digest:
            raise SystemExit(f"{path.name}: {name} has other pixels than the reference")


def rows(found: dict[str, Figures]) -> list[str]:
    """A table of one file."""
    alone = next(iter(found.values()))
    lines = []
    for way, figures in found.items():
        memory = "-"
        if figures.result_bytes:
            memory = f"{figures.peak_bytes / figures.result_bytes:.2f}"
        lines.append(
            f"{way:>15} {figures.wall_s:8.2f} {figures.cpu_s:8.2f}"
            f" {figures.cpu_s / alone.cpu_s:8.2f} {figures.wall_s / alone.cpu_s:8.2f}"
            f" {figures.peak_bytes / 2**20:9.0f} {memory:>7}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--only", nargs="*", default=[], help="files whose name has one of these")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, path, model = options.one
        print(json.dumps(asdict(measure(way, Path(path), Path(model), options.repeats))))
        return
    from support.tiny import make_tiny_model

    model = WORK_DIR / "model"
    if not model.exists():
        make_tiny_model(model, architecture="qwen2_5_vl", num_layers=1, vision_depth=1)
    machine = card(torch.device("cpu"))
    print(summary(machine), flush=True)
    result: dict[str, Any] = {"card": machine, "settings": SETTINGS, "files": []}
    for file in FILES:
        if options.only and not any(word in file.name for word in options.only):
            continue
        path = file.write(WORK_DIR)
        hour = file.seconds == HOUR
        ways = HOURS_WAYS if hour else WAYS
        found = {way: apart(way, path, model, options.repeats) for way in ways}
        if not hour:
            gate(found, path, model)
        print(f"\n{file.name}" + ("" if hour else ", pixels equal to the bit"))
        print(
            f"{'':>15} {'wall s':>8} {'cpu s':>8} {'x cpu':>8} {'x wall':>8} {'peak MiB':>9} of it"
        )
        print("\n".join(rows(found)), flush=True)
        split = ", ".join(f"{name} {took:.2f}" for name, took in found["pevlm"].stages.items())
        print(f"  pevlm by stage, seconds over all threads: {split}", flush=True)
        figures = {way: asdict(one) for way, one in found.items()}
        result["files"].append({"file": asdict(file), "ways": figures})
        write_json(options.out, result)


if __name__ == "__main__":
    main()
