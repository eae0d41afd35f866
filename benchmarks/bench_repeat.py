"""The next question on a video, and the next video of a conversation: SGLang beside PEVLM.

    python benchmarks/bench_repeat.py [--out FILE] [--seconds 900] [--questions 10] [--turns 8]

Method. Two real servers with the same small Qwen2.5-VL, SGLang's own and one with PEVLM, both with
their prefix cache. Time to the first token (a request for one, by the wall) of:

- ``question k``: the k-th question on one file of 720p H.264, 256 sampled frames. All but the
  question's tokens are in the prefix cache from the second on.
- ``text``: a prompt of as many tokens without media, of which as few are not cached: what a further
  question could cost at best.
- ``turn k``: of a conversation in which each turn brings a further clip of 16 frames, and the
  conversation is sent as a whole, as in the chat API.

Beside each: the frames that the server decoded for it (PEVLM's own count), and the tokens that it
found in its prefix cache.

No figure without a green gate: on PEVLM's side the log-probs of the second question must be those
that a server with empty caches gives to it alone, to 1e-4.

Figures: benchmarks/results/repeat-cpu.json, in docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_media import File
from machine import card, summary, write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # `support` lives there

from support.exchange import SYSTEM, VIDEO, user  # noqa: E402
from support.server import Server  # noqa: E402
from support.tiny import make_tiny_model  # noqa: E402
from support.video import write_video  # noqa: E402

WORK_DIR = ROOT / ".cache" / "bench_repeat"
SIDES = ("sglang", "pevlm")
TOLERANCE = 1e-4
SAMPLED = '{"video": {"max_frames": 256, "min_pixels": 3136, "max_pixels": 47040}}'
"""60 tokens a step of two frames: 7680 of a long video."""


def serve(model: Path, side: str, log: Path) -> Server:
    backend = "pevlm" if side == "pevlm" else "torch_native"
    flags = ("--attention-backend", backend, "--skip-server-warmup")
    return Server(
        model,
        *flags,
        *("--mm-process-config", SAMPLED, "--chunked-prefill-size", "2048"),
        env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        log_path=log,
        startup_timeout=600,
    )


class Client:
    """Asks a server for one token, and times it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def ask(self, **body: Any) -> dict[str, Any]:
        """Seconds, frames decoded, tokens in all and found in the prefix cache, log-probs."""
        logged = len(self._server.log())
        sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
        began = time.perf_counter()
        answer = self._server.generate(sampling_params=sampling, top_logprobs_num=20, **body)
        took = time.perf_counter() - began
        decoded = re.findall(r"PEVLM media, #frame: (\d+)", self._server.log()[logged:])
        info = answer["meta_info"]
        return {
            "seconds": round(took, 3),
            "frames": sum(map(int, decoded)),
            "prompt_tokens": info["prompt_tokens"],
            "cached_tokens": info["cached_tokens"],
            "logprobs": {token: value for value, token, _ in info["output_top_logprobs"][0]},
        }

    def question(self, video: Path, number: int) -> dict[str, Any]:
        text = SYSTEM + user(f"{VIDEO}Question {number:03}: what happens?")
        return self.ask(text=text, video_data=[str(video)], return_logprob=True)

    def flush(self) -> None:
        if self._server.post("/flush_cache?timeout=30").status_code != 200:
            sys.exit("bench_repeat: /flush_cache: expected HTTP 200")


def measure(client: Client, video: Path, clips: list[Path], questions: int) -> list[dict[str, Any]]:
    rows = []
    asked = [client.question(video, number) for number in range(1, questions + 1)]
    for number in sorted({1, 2, questions}):
        rows.append({"what": f"question {number}", **asked[number - 1]})
    length, new = (
        asked[-1]["prompt_tokens"],
        asked[-1]["prompt_tokens"] - asked[-1]["cached_tokens"],
    )
    prefix = [7 + i % 90 for i in range(length - new)]
    for last in (3, 5):  # the first fills the cache
        text = client.ask(input_ids=prefix + [last] * new, return_logprob=True)
    rows.append({"what": "text", **text})
    conversation = SYSTEM
    for turn in range(1, len(clips) + 1):
        conversation += user(f"{VIDEO}And now?")
        row = client.ask(
            text=conversation, video_data=[str(one) for one in clips[:turn]], return_logprob=True
        )
        rows.append({"what": f"turn {turn}", **row})
        conversation += "Yes.<|im_end|>\n"
    return rows


def gate(client: Client, video: Path, rows: list[dict[str, Any]]) -> float:
    """Ask the second question alone, and end here unless the answer is the same."""
    client.flush()
    alone = client.question(video, 2)
    second = next(row for row in rows if row["what"] == "question 2")
    if (alone["cached_tokens"], second["frames"]) != (0, 0) or not alone["frames"]:
        sys.exit(f"bench_repeat: gate: expected empty and full caches, got {alone} and {second}")
    common = alone["logprobs"].keys() & second["logprobs"].keys()
    difference = max(abs(alone["logprobs"][k] - second["logprobs"][k]) for k in common)
    if difference > TOLERANCE:
        sys.exit(f"bench_repeat: gate: expected at most {TOLERANCE}, got {difference}")
    return difference


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'':>12}{'tokens':>8}{'SGLang':>21}{'PEVLM':>29}{'ratio':>8}"]
    lines.append(f"{'':>20}{'cached':>11}{'seconds':>10}{'cached':>9}{'decoded':>9}{'seconds':>11}")
    for theirs, ours in zip(*(found[side] for side in SIDES), strict=True):
        lines.append(
            f"{ours['what']:>12}{ours['prompt_tokens']:>8}"
            f"{theirs['cached_tokens']:>11}{theirs['seconds']:>10.2f}"
            f"{ours['cached_tokens']:>9}{ours['frames']:>9}{ours['seconds']:>11.2f}"
            f"{theirs['seconds'] / ours['seconds']:>7.1f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    parser.add_argument("--seconds", type=int, default=900, help="of the video (default: 900)")
    parser.add_argument("--questions", type=int, default=10, help="on it (default: 10)")
    parser.add_argument("--turns", type=int, default=8, help="of the conversation (default: 8)")
    options = parser.parse_args()
    header = card(torch.device("cpu"))
    print(summary(header), flush=True)
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    model = make_tiny_model(WORK_DIR / "model")
    video = File("libx264", (1280, 720), options.seconds, 250).write(WORK_DIR)
    clips = [
        write_video(WORK_DIR / f"turn-{turn}.mp4", seconds=8, size=(224, 168), seed=turn)
        for turn in range(options.turns)
    ]
    found, difference = {}, 0.0
    for side in SIDES:
        with serve(model, side, WORK_DIR / f"{side}.log") as server:
            client = Client(server)
            client.ask(text=SYSTEM + user(VIDEO), video_data=[str(clips[0])], return_logprob=True)
            client.flush()
            found[side] = measure(client, video, clips, options.questions)
            if side == "pevlm":
                difference = gate(client, video, found[side])
    print(f"gate: the second question's log-probs differ by {difference:.1e} from those alone")
    print(table(found))
    for rows in found.values():
        for row in rows:
            del row["logprobs"]
    write_json(options.out, {"card": header, "gate": difference, **found})


if __name__ == "__main__":
    main()
