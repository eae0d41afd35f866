"""Time to first token and throughput through the HTTP server, full attention beside PEVLM.

    python benchmarks/bench_serving.py                    # without a GPU: a tiny model
    python benchmarks/bench_serving.py                    # a GPU: Qwen2.5-VL-7B's dimensions

Method. The server is benchmarks/serving.py's: SGLang with PEVLM, random weights, nothing to
download, and a gate before it. Videos of noise and moving bars, a file each, are asked about under
full attention and under PEVLM in turns, which a request chooses by ``custom_params``; every request
finds empty caches. First one at a time: medians of the repeats, with the server's own account of
where the time went (benchmarks/stopwatch.py), part by part of the same requests:

- ``decode``: opening the video and decoding its sampled frames.
- ``preproc``: resizing, patches, token ids: the rest of the tokenizer process's work.
- ``vision``: the vision tower, on its device.
- ``prefill``: the language model's, on its device; ``attention`` is its share in attention.
- ``rest``: what is left of the time to the first token: HTTP, messages between processes,
  scheduling, sampling. The only part that is a difference.

Then several at once, each with a video of its own: the median time to the first token, and prompt
tokens a second from the first request to the last answer.
The benchmark fails if PEVLM saved no attention pair, or full attention did.

Sample output, of one run with ``--seconds 40 --repeats 1`` on two cores that others were using too;
requests at once mostly wait for each other's videos there:

    prompt: 5631 tokens
              first token     decode    preproc     vision    prefill  attention       rest
    full           2.46 s       0.15       0.65       0.21       1.26       0.89       0.19
    pevlm          2.37 s       0.19       0.41       0.33       1.11       0.66       0.34

    3 at once        first token (median)   prompt tokens/s   requests/min
    full                           8.99 s              1867           19.9
    pevlm                          8.00 s              2100           22.4
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import card, summary, write_json
from serving import GRAPHS, PARTS, REAL, WORK_DIR, Client, running, write_video

FPS = 2.0  # what SGLang samples
KINDS = {"full": False, "pevlm": True}


def alone(client: Client, video: Path, repeats: int) -> dict[str, Any]:
    """One request at a time: medians of every part."""
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind, pevlm in KINDS.items():
            runs[kind].append(client.split(video, pevlm=pevlm))
            if pevlm and not runs[kind][-1]["saved"]:
                sys.exit("bench_serving: PEVLM saved no attention pair; longer videos are needed")
    found: dict[str, Any] = {"prompt_tokens": runs["full"][0]["prompt_tokens"]}
    for kind, own in runs.items():
        found[kind] = {
            f"{part}_s": statistics.median(run[part] for run in own)
            for part in ("first_token", *PARTS)
        }
    return found


def together(client: Client, videos: list[Path], repeats: int) -> dict[str, Any]:
    """All videos at once: medians of the rounds, in which the kinds take turns."""
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind, pevlm in KINDS.items():
            rounds[kind].append(one_round(client, videos, pevlm=pevlm))
    found: dict[str, Any] = {"requests": len(videos)}
    for kind, own in rounds.items():
        found[kind] = {name: statistics.median(row[name] for row in own) for name in own[0]}
    return found


def one_round(client: Client, videos: list[Path], *, pevlm: bool) -> dict[str, float]:
    client.flush()
    start = time.perf_counter()
    with ThreadPoolExecutor(len(videos)) as pool:
        answers = list(pool.map(partial(client.video, pevlm=pevlm), videos))
    elapsed = time.perf_counter() - start
    return {
        "first_token_median_s": statistics.median(seconds for seconds, _ in answers),
        "prompt_tokens_per_s": sum(tokens for _, tokens in answers) / elapsed,
        "requests_per_minute": 60 * len(videos) / elapsed,
    }


def report(single: dict[str, Any], many: dict[str, Any]) -> str:
    """The two tables."""
    names = ("decode", "preproc", "vision", "prefill", "attention", "rest")
    lines = [
        f"prompt: {single['prompt_tokens']} tokens",
        f"{'':8}{'first token':>13}" + "".join(f"{name:>11}" for name in names),
    ]
    for kind in KINDS:
        own = single[kind]
        prefill = own["attention_s"] + own["other_prefill_s"]
        parts = [own["decode_s"], own["preprocess_s"], own["vision_s"], prefill]
        parts += [own["attention_s"], own["rest_s"]]
        lines.append(
            f"{kind:8}{own['first_token_s']:>11.2f} s" + "".join(f"{part:>11.2f}" for part in parts)
        )
    head = f"{many['requests']} at once{'first token (median)':>28}{'prompt tokens/s':>18}"
    lines += ["", head + f"{'requests/min':>15}"]
    for kind in KINDS:
        row = many[kind]
        lines.append(
            f"{kind:16}{row['first_token_median_s']:>19.2f} s{row['prompt_tokens_per_s']:>18.0f}"
            f"{row['requests_per_minute']:>15.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="a server's time to first token and throughput")
    default = "Qwen2.5-VL-7B" if on_gpu else "tiny"
    parser.add_argument("--model", choices=("tiny", *REAL), default=default)
    parser.add_argument("--seconds", type=float, default=330 if on_gpu else 60, help="of a video")
    parser.add_argument("--size", default="644x364" if on_gpu else "392x280", help="of its frames")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--concurrent", type=int, default=3, help="requests at once (default: 3)")
    graphs = "CUDA graphs of the server (default: SGLang's own)"
    parser.add_argument("--cuda-graphs", choices=GRAPHS, default="sglang", help=graphs)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    width, height = (int(part) for part in options.size.split("x"))

    def video(seed: int, seconds: float) -> Path:
        path = WORK_DIR / f"{options.size}-{seconds:g}s-{seed}.mp4"
        if not path.exists():
            write_video(path, seconds=seconds, fps=FPS, size=(width, height), seed=seed)
        return path

    about = card(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    print(summary(about))
    result: dict[str, Any] = {"benchmark": "serving", "card": about, "model": options.model}
    result |= {"video_seconds": options.seconds, "frame": options.size, "complete": False}
    videos = [video(seed, options.seconds) for seed in range(options.concurrent)]
    with running(options.model, graphs=options.cuda_graphs) as server:
        client = Client(server.url)
        result["cuda_graphs"] = client.graphs()
        for pevlm in KINDS.values():
            client.video(video(99, 24), pevlm=pevlm)
        result |= {"gate": server.gate, "alone": alone(client, videos[0], options.repeats)}
        write_json(options.output, result)
        result |= {"together": together(client, videos, options.repeats), "complete": True}
    write_json(options.output, result)
    print(f"\n{report(result['alone'], result['together'])}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
