"""Time to first token and throughput through the HTTP server, full attention beside PEVLM.

    python benchmarks/bench_serving.py                       # starts a tiny model on the CPU
    python benchmarks/bench_serving.py --url http://localhost:30000 --seconds 390 --size 644x364

The second form measures a server that is running, for instance on a GPU with a real model's
dimensions and random weights:

    sglang serve --model-path Qwen/Qwen2.5-VL-7B-Instruct --load-format dummy \\
        --attention-backend pevlm --chunked-prefill-size -1

Method. One video of noise and moving bars, asked about under PEVLM and under full attention in
turns, which a request chooses by ``custom_params``; every request finds empty caches
(``/flush_cache``) unless it is meant to hit one. Medians of the runs. Then several requests at
once, each with a video of its own. From outside, the time to first token splits like this:

- ``input``: a repeated request, whose tokens are all in the prefix cache: HTTP, video decoding and
  preprocessing.
- ``prefill`` of the language model under full attention: a text prompt of as many tokens.
- ``vision tower``: what is left of the request under full attention; the same under PEVLM.
- ``prefill`` under PEVLM: what is left of its request.

Parts are differences of medians, so on a busy machine they are rough, and may be negative.
The benchmark fails if PEVLM saved no attention pair, or full attention did.

Sample output, on two cores that others were using too; three requests at once only wait for their
videos to be decoded there:

    prompt: 8431 tokens
                     first token    input   vision  prefill
    full                  7.25 s     3.42    -0.26     4.09
    pevlm                 4.68 s     3.42    -0.26     1.52

    3 at once        first token (median)   prompt tokens/s
    full                          18.44 s              1345
    pevlm                         18.58 s              1308
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from machine import card

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # `support` lives there

from support.server import Server
from support.tiny import make_tiny_model
from support.video import video_data_url, write_video

WORK_DIR = Path(__file__).resolve().parent.parent / ".cache" / "bench_serving"
MODEL: dict[str, Any] = {"num_layers": 6, "hidden_size": 256, "vision_depth": 1}
FPS = 2.0  # what SGLang samples
ANSWER_TOKENS = 4
KINDS = {"full": False, "pevlm": True}


class Client:
    """Requests to a server, timed from sending to the first streamed token."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False

    def get(self, path: str) -> Any:
        response = self.session.get(self.url + path, timeout=60)
        response.raise_for_status()
        return response.json()

    def flush(self) -> None:
        self.session.post(f"{self.url}/flush_cache?timeout=30", timeout=60).raise_for_status()

    def counters(self) -> dict[str, int]:
        totals: dict[str, int] = self.get("/server_info")["internal_states"][0]["pevlm"]
        return totals

    def video(self, url: str, *, pevlm: bool) -> tuple[float, int]:
        """Seconds to the first token, and tokens of the prompt."""
        content = [
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "text", "text": "What happens in the video?"},
        ]
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "custom_params": {"pevlm": {"enabled": pevlm}},
        }
        return self._stream("/v1/chat/completions", body)

    def text(self, num_tokens: int) -> float:
        """Seconds to the first token of a text prompt of random tokens."""
        ids = torch.randint(20, 200, (num_tokens,)).tolist()
        sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        return self._stream("/generate", body)[0]

    def _stream(self, path: str, body: dict[str, Any]) -> tuple[float, int]:
        first, prompt_tokens = 0.0, 0
        start = time.perf_counter()
        # A session's connections are not for several threads.
        response = requests.post(self.url + path, json=body, stream=True, timeout=1800)
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{path}: {event['error']}")
            # The first event of a chat holds the role alone.
            delta = (event.get("choices") or [{}])[0].get("delta", {})
            if not first and (delta.get("content") or "text" in event):
                first = time.perf_counter() - start
            prompt_tokens = (event.get("usage") or {}).get("prompt_tokens", prompt_tokens)
        # Tokens that decode to no text are streamed with the last event.
        return first or time.perf_counter() - start, prompt_tokens


def alone(client: Client, video: str, repeats: int) -> dict[str, Any]:
    """One request at a time."""
    times: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "input", "text")}
    prompt_tokens = 0
    for _ in range(repeats):
        for kind, pevlm in KINDS.items():
            client.flush()
            before = client.counters()
            seconds, prompt_tokens = client.video(video, pevlm=pevlm)
            saved = client.counters()["pairs_saved"] - before["pairs_saved"]
            if bool(saved) != pevlm:
                sys.exit(f"bench_serving: {kind}: {saved} attention pairs saved; see /server_info")
            times[kind].append(seconds)
        times["input"].append(client.video(video, pevlm=True)[0])
        times["text"].append(client.text(prompt_tokens))
    median = {kind: statistics.median(values) for kind, values in times.items()}
    vision = median["full"] - median["input"] - median["text"]
    return {
        "prompt_tokens": prompt_tokens,
        "ttft_s": {kind: median[kind] for kind in KINDS},
        "input_s": median["input"],
        "vision_tower_s": vision,
        "prefill_s": {
            "full": median["text"],
            "pevlm": median["pevlm"] - median["input"] - vision,
        },
    }


def together(client: Client, videos: list[str]) -> dict[str, Any]:
    """All videos at once."""
    found: dict[str, Any] = {"requests": len(videos)}
    for kind, pevlm in KINDS.items():
        client.flush()
        start = time.perf_counter()
        with ThreadPoolExecutor(len(videos)) as pool:
            answers = list(pool.map(lambda url, on=pevlm: client.video(url, pevlm=on), videos))
        elapsed = time.perf_counter() - start
        found[kind] = {
            "ttft_median_s": statistics.median(seconds for seconds, _ in answers),
            "prompt_tokens_per_s": sum(tokens for _, tokens in answers) / elapsed,
        }
    return found


@contextmanager
def server_url(given: str | None) -> Iterator[str]:
    """A running server, or a tiny model on the CPU for the time being."""
    if given:
        yield given.rstrip("/")
        return
    model = make_tiny_model(WORK_DIR / "model", **MODEL)
    flags = ("--attention-backend", "pevlm", "--chunked-prefill-size", "-1")
    env = {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
    with Server(model, *flags, env=env, log_path=WORK_DIR / "server.log") as server:
        yield server.url


def report(single: dict[str, Any], many: dict[str, Any]) -> None:
    ttft, prefill = single["ttft_s"], single["prefill_s"]
    print(f"\nprompt: {single['prompt_tokens']} tokens")
    print(f"{'':16}{'first token':>12}{'input':>9}{'vision':>9}{'prefill':>9}")
    for kind in KINDS:
        print(
            f"{kind:16}{ttft[kind]:>10.2f} s{single['input_s']:>9.2f}"
            f"{single['vision_tower_s']:>9.2f}{prefill[kind]:>9.2f}"
        )
    print(f"\n{many['requests']} at once{'first token (median)':>28}{'prompt tokens/s':>18}")
    for kind in KINDS:
        row = many[kind]
        print(f"{kind:16}{row['ttft_median_s']:>19.2f} s{row['prompt_tokens_per_s']:>18.0f}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="a server's time to first token and throughput")
    parser.add_argument("--url", help="of a running server (default: starts one on the CPU)")
    parser.add_argument("--seconds", type=float, default=60, help="of the video (default: 60)")
    parser.add_argument("--size", default="392x280", help="of its frames (default: 392x280)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--concurrent", type=int, default=3, help="requests at once (default: 3)")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    width, height = (int(part) for part in options.size.split("x"))

    def video(seed: int, seconds: float) -> str:
        path = WORK_DIR / f"{options.size}-{seconds:g}s-{seed}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, seconds=seconds, fps=FPS, size=(width, height), seed=seed)
        url: str = video_data_url(path)
        return url

    about = card(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    print("\n".join(f"{key}: {value}" for key, value in about.items() if value is not None))
    videos = [video(seed, options.seconds) for seed in range(options.concurrent)]
    with server_url(options.url) as url:
        client = Client(url)
        for pevlm in KINDS.values():
            client.video(video(99, 24), pevlm=pevlm)
        single = alone(client, videos[0], options.repeats)
        many = together(client, videos)
    report(single, many)
    result = {"benchmark": "serving", "card": about, "alone": single, "together": many}
    if options.output:
        options.output.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
