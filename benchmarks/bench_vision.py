"""What it saves to encode each step once, and by itself: SGLang's vision path beside PEVLM's.

    python benchmarks/bench_vision.py

Method. Two real servers answer the same questions about longer and longer videos: SGLang's own, and
one with PEVLM, switched off in the language model (``--pevlm-enabled false``), so that nothing but
the vision path differs. Prefill goes in chunks. For each video: runs of the vision tower and their
time on the device, by the benchmarks' stopwatch in both servers, and the time to first token (a
request for one token, from sending it to its answer; decoding and processor are in it). The
smallest of the repeats is reported for each figure, the least disturbed by others on the machine.

Where there is a CUDA GPU, the model has the dimensions of Qwen2.5-VL-7B with random weights, and
SGLang its default cache of 100 MB for embeddings. Elsewhere (``--device cpu``) it is a small
Qwen2.5-VL, one of whose eight vision layers attends beyond windows as four of 32 do in the large
one; its embeddings are small, so that the cache is off (``SGLANG_VLM_CACHE_SIZE_MB=0``) to stand
for videos that exceed it. On the CPU platform of this repository SGLang's vision attention computes
segment by segment on both sides, as it does on a GPU.

No figure without a green gate: on a short clip, cut by a chunk, log-probs of each side must equal
Hugging Face's model with the same vision path, and the two paths must differ. (On a GPU the gate
runs the small model in float32.) And the PEVLM side must have encoded each clip of a
video once.

- Times that a frame is encoded: SGLang encodes a video again for each chunk that overlaps it. PEVLM
  encodes a clip once.
- Time of encoding a frame once: SGLang's tower attends over the whole video, so it grows with the
  length of the video. PEVLM's attends within each step, so it does not.

The GPU side was never run: unmeasured. Sample output on a CPU, of a virtual machine that others
kept busier than it has cores (load 6.9 on 2), both language models under PEVLM's mask: the runs are
exact, the times are blurred, the middle row's most (the last line, one JSON object, is left out):

    Intel(R) Xeon(R) Processor, cores 2, threads 2, load 6.9
    starting the server: upstream
      gate: 5.7e-06 from its own reference, 4.1e+00 from the other's
      32 frames: each encoded 2 times, 0.53 s
      64 frames: each encoded 4 times, 3.23 s
      128 frames: each encoded 7 times, 16.85 s
    starting the server: pevlm
      gate: 5.7e-06 from its own reference, 4.1e+00 from the other's
      32 frames: each encoded 1 times, 0.23 s
      64 frames: each encoded 1 times, 0.96 s
      128 frames: each encoded 1 times, 1.20 s

                    times encoded once, ms a frame           tower                 first token
    frames  tokens  SGLang  PEVLM   SGLang    PEVLM   SGLang   PEVLM  ratio   SGLang   PEVLM  ratio
        32     799       2      1     8.21     7.27   0.53 s  0.23 s   2.3x   0.65 s  0.35 s  1.83x
        64    1567       4      1    12.61    15.02   3.23 s  0.96 s   3.4x   3.47 s  1.61 s  2.16x
       128    3103       7      1    18.80     9.41  16.85 s  1.20 s  14.0x  17.39 s  1.86 s  9.37x
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import stopwatch
import torch
from machine import card, summary
from serving import write_real

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # `support` lives there

from support.exchange import BATCH_ENV, SHARP, TOLERANCE, Exchange, about  # noqa: E402
from support.families.qwen_vl import QwenVLOracle  # noqa: E402
from support.server import Server  # noqa: E402
from support.tiny import make_tiny_model  # noqa: E402
from support.video import write_video  # noqa: E402

WORK_DIR = ROOT / ".cache" / "bench_vision"
SIDES = ("upstream", "pevlm")
FPS = 2.0  # of the clips, which is what SGLang samples: every frame is one
SMALL_MODEL: dict[str, Any] = {
    "vision_depth": 8,
    "vision_hidden_size": 160,
    "vision_num_heads": 4,
}
FEW_TOKENS = ("--mm-process-config", '{"video": {"min_pixels": 3136}}')


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device.

    Attributes:
        seconds: lengths of the videos, two frames a second.
        frame: (width, height) in pixels; 28 x 28 of them are a token of a step of two frames.
        chunk: ``--chunked-prefill-size``.
    """

    seconds: tuple[int, ...]
    frame: tuple[int, int]
    chunk: int


SIZES = {
    "cpu": Sizes((16, 32, 64), (224, 168), 512),  # 48 tokens a step
    "cuda": Sizes((64, 128, 256, 384), (448, 336), 8192),  # 192 tokens a step
}


@dataclass(frozen=True)
class Figures:
    """One video on one side.

    Attributes:
        frames: sampled.
        prompt_tokens: of the expanded prompt.
        times: that a frame was encoded.
        vision_s: time of the runs on the device.
        ttft_s: time to first token.
    """

    frames: int
    prompt_tokens: int
    times: float
    vision_s: float
    ttft_s: float

    @property
    def frame_ms(self) -> float:
        """Of encoding a frame once."""
        return 1000 * self.vision_s / self.times / self.frames


def serve(model: Path, side: str, device: str, chunk: int, work: Path, *, small: bool) -> Server:
    """A server with one of the vision paths.

    Args:
        small: whether the model is the small one, with weights, in float32.
    """
    flags = ["--chunked-prefill-size", str(chunk), *FEW_TOKENS, "--skip-server-warmup"]
    env = dict(BATCH_ENV)
    plugin = str(stopwatch.install(work / "plugin"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (plugin, os.environ.get("PYTHONPATH"))))
    if side == "pevlm":
        flags += ["--attention-backend", "pevlm", "--pevlm-enabled", "false"]
    elif device == "cpu":
        flags += ["--attention-backend", "torch_native"]
    if small:
        env["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
    if device == "cuda":
        env |= {"SGLANG_PLATFORM": "", "TORCHDYNAMO_DISABLE": "0"}
        flags += ["--device", "cuda", "--max-total-tokens", "131072"]
        if small:
            flags += ["--mm-attention-backend", "sdpa"]
            if side == "pevlm":
                flags += ["--pevlm-base-backend", "torch_native"]
            else:
                flags += ["--attention-backend", "torch_native"]
            flags += ["--disable-cuda-graph"]
        else:
            flags += ["--load-format", "dummy", "--dtype", "bfloat16"]
            flags += ["--mem-fraction-static", "0.7"]
    log = work / f"{side}-{'small' if small else '7b'}.log"
    return Server(model, *flags, env=env, log_path=log, startup_timeout=600)


def check(
    server: Server, oracle: QwenVLOracle, other: QwenVLOracle, clip: Path, device: str
) -> str:
    """The gate: the server equals its own reference and differs from the other side's."""
    exchange = Exchange(server, oracle)
    question = about(clip, setting=None)
    [answer] = exchange.ask(question)
    own = exchange.difference(question, answer, None)
    others = Exchange(server, other).difference(question, answer, None)
    bound = TOLERANCE if device == "cpu" else SHARP  # GPUs may multiply float32 in TF32
    verdict = f"{own:.1e} from its own reference, {others:.1e} from the other's"
    if own > bound or others < SHARP:
        sys.exit(f"bench_vision: gate: expected at most {bound}, at least {SHARP}; got {verdict}")
    return verdict


def measure(server: Server, clips: dict[int, Path], repeats: int) -> list[Figures]:
    """Each video, on empty caches."""
    figures = []
    ask(server, clips[min(clips)], frames=0)  # warm up
    for seconds, clip in clips.items():
        frames = round(seconds * FPS)
        runs = [ask(server, clip, frames=frames) for _ in range(repeats)]
        if len({run.times for run in runs}) != 1:
            sys.exit(f"bench_vision: runs of the tower differ between repeats: {runs}")
        best = replace(
            runs[0],
            vision_s=min(run.vision_s for run in runs),
            ttft_s=min(run.ttft_s for run in runs),
        )
        print(
            f"  {frames} frames: each encoded {best.times:g} times, {best.vision_s:.2f} s",
            flush=True,
        )
        figures.append(best)
    return figures


def ask(server: Server, clip: Path, *, frames: int) -> Figures:
    flushed = server.post("/flush_cache?timeout=10")
    if flushed.status_code != 200:
        sys.exit(f"bench_vision: /flush_cache: expected HTTP 200, got {flushed.status_code}")
    before = measured(server)
    start = time.perf_counter()
    answer = server.generate(
        text=about(clip).text,
        video_data=[str(clip)],
        sampling_params={"temperature": 0, "max_new_tokens": 1},
    )
    ttft = time.perf_counter() - start
    after = measured(server)
    return Figures(
        frames=frames,
        prompt_tokens=answer["meta_info"]["prompt_tokens"],
        times=round(2 * (after["vision_steps"] - before["vision_steps"]) / frames, 2),
        vision_s=round(after["vision"] - before["vision"], 4),
        ttft_s=round(ttft, 4),
    )


def measured(server: Server) -> dict[str, float]:
    """The stopwatch's totals; no embedding may be held between requests."""
    state = server.info()["internal_states"][0]
    if kept := state.get("pevlm", {}).get("vision_kept_bytes"):
        sys.exit(f"bench_vision: {kept} bytes of embeddings are still held")
    found: dict[str, float] = state[stopwatch.KEY]
    return found


def table(figures: dict[str, list[Figures]]) -> str:
    """A row a video: SGLang's figure, PEVLM's, and their ratio."""
    head = f"{'':15}{'times encoded':^15}{'once, ms a frame':^18}{'tower':^24}{'first token':>18}"
    names = "".join(f"{'SGLang':>{w}}{'PEVLM':>{w}}" for w in (7, 9))
    names += 2 * f"{'SGLang':>9}{'PEVLM':>8}{'ratio':>7}"
    lines = [head, f"{'frames':>6}{'tokens':>8} {names}"]
    for up, own in zip(*(figures[side] for side in SIDES), strict=True):
        lines.append(
            f"{up.frames:>6}{up.prompt_tokens:>8} {up.times:>7g}{own.times:>7g}"
            f"{up.frame_ms:>9.2f}{own.frame_ms:>9.2f}"
            f"{up.vision_s:>7.2f} s{own.vision_s:>6.2f} s{up.vision_s / own.vision_s:>6.1f}x"
            f"{up.ttft_s:>7.2f} s{own.ttft_s:>6.2f} s{up.ttft_s / own.ttft_s:>6.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="SGLang's vision path beside PEVLM's")
    parser.add_argument("--device", choices=SIZES, help="default: cuda where there is one, or cpu")
    parser.add_argument("--seconds", type=int, nargs="+", help="lengths of the videos")
    parser.add_argument("--chunk", type=int, help="chunked prefill size (cpu: 512, cuda: 8192)")
    parser.add_argument("--repeats", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument(
        "--work-dir", type=Path, default=WORK_DIR, help="for models, videos and logs"
    )
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats: expected >= 1, got {options.repeats}")
    work: Path = options.work_dir
    device: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES[device]
    chunk: int = options.chunk or sizes.chunk

    header = card(torch.device(device))
    print(summary(header), flush=True)
    small = make_tiny_model(work / "small", **SMALL_MODEL)
    clips = {
        seconds: write_video(work / f"{seconds}s.mp4", seconds=seconds, fps=FPS, size=sizes.frame)
        for seconds in options.seconds or sizes.seconds
    }
    short = write_video(work / "gate.mp4", seconds=12, size=SIZES["cpu"].frame)  # 576 tokens
    oracles = {side: QwenVLOracle(small, upstream_vision=side == "upstream") for side in SIDES}

    figures: dict[str, list[Figures]] = {}
    gate: dict[str, str] = {}
    for side in SIDES:
        other = oracles["pevlm" if side == "upstream" else "upstream"]
        print(f"starting the server: {side}", flush=True)
        gate_chunk = chunk if device == "cpu" else SIZES["cpu"].chunk
        with serve(small, side, device, gate_chunk, work, small=True) as server:
            gate[side] = check(server, oracles[side], other, short, device)
            print(f"  gate: {gate[side]}", flush=True)
            if device == "cpu":
                figures[side] = measure(server, clips, options.repeats)
        if device == "cuda":
            model = write_real("Qwen2.5-VL-7B", work, small)
            with serve(model, side, device, chunk, work, small=False) as server:
                figures[side] = measure(server, clips, options.repeats)
    if any(own.times != 1 for own in figures["pevlm"]):
        sys.exit("bench_vision: expected each frame to be encoded once on the PEVLM side")
    result = {
        "card": header,
        "device": device,
        "chunk": chunk,
        "repeats": options.repeats,
        "gate": gate,
        **{side: [asdict(row) for row in rows] for side, rows in figures.items()},
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{table(figures)}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
