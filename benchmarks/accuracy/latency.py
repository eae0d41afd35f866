"""Accuracy under a limit on latency, through a running server (the paper's Table 2), as JSON.

    python benchmarks/accuracy/latency.py

Method. A real SGLang server on the CPU serves the small model in fp32. Every question is asked
under full attention and under PEVLM's settings, which a request chooses, one request at a time and
in an order that is drawn anew for each question. Nothing is reused: the prefix cache is emptied
before each request, the cache of video embeddings is off. Latency is what the client sees from
sending the request to the answer's last token: reading and decoding the file, processor, vision
tower, prefill and decoding are in it. An answer that comes after the limit counts as wrong; its
latency and its text are of one and the same request.

Two workloads. ``short``: the held-out videos of ``evaluate.py``, all tasks; prompts of some 200
tokens. ``long``: held-out videos of 1024 scenes, each an eighth of a second long, so that M-RoPE's
positions, which count seconds, stay near those of the training (256 against 112); 4100 tokens, so
that attention counts. Only ``code`` and ``find`` are asked there: on videos of the split for
examples, full attention answered these two at that length and the others not.

The limits are the 90 %, 50 % and 10 % quantiles of full attention's own latencies in the same
workload, a rule that was fixed before the first run: at the middle one, full attention loses half
its answers.

``results/latency.json`` holds a card; for each workload the limits, for each setting its latencies,
its accuracy under each limit, and the differences to full attention with their tests; and every
answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # `support` lives there

from accuracy.answers import Answers, tested
from accuracy.card import MODEL, RESULTS, card
from accuracy.claims import better
from accuracy.claims import tested as judged_accuracies
from accuracy.dataset import EXAMPLE, HELD_OUT, HELD_OUT_SCENES, Clip, make_clip
from accuracy.model import STEP_TOKENS
from accuracy.questions import TASKS
from accuracy.videos import FPS, FRAME

from pevlm_sglang.tune.client import Client
from support.server import Server

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"enabled": False},
    "sys+2f": {"enabled": True, "sink_frames": 2, "block_frames": 16},
    "sys+16f": {"enabled": True, "sink_frames": 16, "block_frames": 16},
}


@dataclass(frozen=True)
class Workload:
    """Attributes: lengths: scenes of a video. fps: its frames a second, two a scene. tasks: asked.
    videos: of each length. each: questions a task and video, where it allows them."""

    lengths: tuple[int, ...]
    fps: float
    tasks: tuple[str, ...]
    videos: int
    each: int


WORKLOADS = {
    "short": Workload(HELD_OUT_SCENES, FPS, TASKS, videos=20, each=1),
    "long": Workload((1024,), 8 * FPS, ("code", "find"), videos=16, each=3),
}
MOST_TEXT = 64  # tokens of a prompt beside its video
QUANTILES = (0.9, 0.5, 0.1)  # of full attention's latencies: the limits
NO_LIMIT = "none"
FLAGS = ("--attention-backend", "pevlm", "--chunked-prefill-size", "-1")
WARM_UP = 2  # questions that are not counted


def ask(client: Client, clip: Clip, video: Path, number: int, seed: int) -> list[dict[str, Any]]:
    """Every question about a video under every setting: a row each.

    Raises:
        RuntimeError: a request that did not prefill its whole prompt, or not as it was asked to.
    """
    rng = np.random.default_rng((seed, number))
    rows = []
    for question in clip.questions:
        for setting in rng.permutation([*SETTINGS]):
            client.flush()
            before = client.counters()
            start = time.perf_counter()
            answer = client.ask(video, question.text, setting=SETTINGS[setting], max_tokens=8)
            latency = time.perf_counter() - start
            after = client.counters()
            saved = after.pairs_saved - before.pairs_saved
            pairs = saved + after.pairs_computed - before.pairs_computed
            if not 0 <= answer.prompt_tokens - STEP_TOKENS * len(clip.world) < MOST_TEXT:
                raise RuntimeError(
                    f"{video}: expected all {clip.frames} frames in the prompt, got "
                    f"{answer.prompt_tokens} tokens"
                )
            whole = answer.prompt_tokens * (answer.prompt_tokens + 1) // 2
            if pairs != whole or bool(saved) != SETTINGS[setting]["enabled"]:
                raise RuntimeError(
                    f"{setting}: expected {whole} attention pairs, some of them saved if and only "
                    f"if PEVLM is on, got {pairs} with {saved} saved; does other traffic reach "
                    "the server?"
                )
            rows.append(
                {
                    "video": number,
                    "frames": clip.frames,
                    "task": question.task,
                    "question": question.text,
                    "setting": str(setting),
                    "latency_s": round(latency, 4),
                    "ttft_s": round(answer.ttft, 4),
                    "prompt_tokens": answer.prompt_tokens,
                    "visible_fraction": round(1 - saved / pairs, 4),
                    "right": answer.text.strip() == question.answer
                    and answer.finish_reason == "stop",
                }
            )
    return rows


def times(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each setting the latencies' median, 10 % and 90 % quantile, and the median time to the
    first token; and ``minus_full``, what it takes longer, paired by question, in seconds."""
    found: dict[str, Any] = {}
    base = {(row["video"], row["question"]): row["latency_s"] for row in _of(rows, "full")}
    for name in SETTINGS:
        own = _of(rows, name)
        latencies = [row["latency_s"] for row in own]
        prompts = [row["prompt_tokens"] for row in own]
        found[name] = {
            "median_s": round(statistics.median(latencies), 4),
            "quantiles_s": [round(float(x), 4) for x in np.quantile(latencies, [0.1, 0.9])],
            "ttft_median_s": round(statistics.median(row["ttft_s"] for row in own), 4),
            "visible_fraction": round(statistics.mean(row["visible_fraction"] for row in own), 4),
            "prompt_tokens": [min(prompts), max(prompts)],
        }
        if name != "full":
            by_video: dict[int, list[float]] = {}
            for row in own:
                longer = row["latency_s"] - base[row["video"], row["question"]]
                by_video.setdefault(row["video"], []).append(longer)
            # The median of a video, or one pause of the machine would outweigh all else.
            found[name]["minus_full"] = tested(
                np.array([statistics.median(longer) for longer in by_video.values()])
            )
    return found


def limits_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Name → seconds, from none to the strictest."""
    full = [row["latency_s"] for row in _of(rows, "full")]
    return {NO_LIMIT: float("inf")} | {
        f"{quantile:.0%}": round(float(np.quantile(full, quantile)), 4) for quantile in QUANTILES
    }


def under_limits(
    rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Limit → setting → its accuracy, late answers being wrong; and the paper's claims."""
    questions: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        key = row["video"], row["question"]
        one = questions.setdefault(key, {"video": row["video"], "task": row["task"], "right": {}})
        for limit, most in limits.items():
            one["right"][_name(row["setting"], limit)] = row["right"] and row["latency_s"] <= most
    answers = Answers.of(
        [*questions.values()], [_name(s, limit) for s in SETTINGS for limit in limits]
    )
    accuracy = {
        limit: {setting: answers.accuracy(_name(setting, limit)) for setting in SETTINGS}
        for limit in limits
    }
    tokens = max(row["prompt_tokens"] for row in rows)
    claims = [
        better(
            f"under a limit of {1e3 * most:.0f} ms, PEVLM with {setting} is above full attention "
            "(Table 2)",
            _name(setting, limit),
            _name("full", limit),
            "A limit can only favour PEVLM where attention takes a good part of the latency; these "
            f"prompts have up to {tokens} tokens.",
        )
        for limit, most in limits.items()
        if limit != NO_LIMIT
        for setting in SETTINGS
        if setting != "full"
    ]
    return accuracy, judged_accuracies(claims, answers)


def _name(setting: str, limit: str) -> str:
    return f"{setting}, limit {limit}"


def _of(rows: Sequence[Mapping[str, Any]], setting: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["setting"] == setting]


def measure(
    model: Path, workload: Workload, clips: Sequence[Clip], work: Path
) -> list[dict[str, Any]]:
    """All rows of a workload on a server of its own, after a warm-up on a video of another split.

    Args:
        work: directory for the video files.
    """
    video = {"min_pixels": FRAME**2, "fps": workload.fps, "max_frames": 2 * max(workload.lengths)}
    flags = (*FLAGS, "--mm-process-config", json.dumps({"video": video}))
    with Server(model, *flags, env={"SGLANG_VLM_CACHE_SIZE_MB": "0"}) as server:
        client = Client(server.url)
        warm_up = make_clip(EXAMPLE, workload.lengths[-1], 0, 1, workload.tasks)
        warm_up = replace(warm_up, questions=warm_up.questions[:WARM_UP])
        ask(client, warm_up, warm_up.write(work, workload.fps), 0, seed=0)
        rows = []
        for number, clip in enumerate(clips):
            rows += ask(client, clip, clip.write(work, workload.fps), number, seed=0)
            print(f"video {number + 1} of {len(clips)}", flush=True)
    return rows


def result(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a workload, all but its answers."""
    limits = limits_of(rows)
    accuracy, claims = under_limits(rows, limits)
    return {
        "tasks": [task for task in TASKS if any(row["task"] == task for row in rows)],
        "videos": len({row["video"] for row in rows}),
        "questions": len(rows) // len(SETTINGS),
        "limits_s": {name: limit for name, limit in limits.items() if name != NO_LIMIT},
        "times": times(rows),
        "accuracy": accuracy,
        "claims": claims,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--videos", type=int, help="of each length (default: 20 short, 16 long)")
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args()
    found: dict[str, Any] = {"settings": SETTINGS, "workloads": {}}
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for name, workload in WORKLOADS.items():
            clips = [
                make_clip(HELD_OUT, scenes, i, workload.each, workload.tasks)
                for scenes in workload.lengths
                for i in range(options.videos or workload.videos)
            ]
            rows = measure(options.model, workload, clips, Path(work))
            found["workloads"][name] = {"lengths": workload.lengths, "fps": workload.fps} | result(
                rows
            )
            answers += [{"workload": name, **row} for row in rows]
            print(name, json.dumps(found["workloads"][name]["times"], indent=1), flush=True)
    videos = sum(one["videos"] for one in found["workloads"].values())
    found |= {"card": card(options.model, videos=videos), "columns": [*answers[0]]}
    body = ",\n  ".join(json.dumps([*answer.values()]) for answer in answers)  # a line each
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        f'{json.dumps(found, indent=1)[:-2]},\n "answers": [\n  {body}\n ]\n}}\n'
    )


if __name__ == "__main__":
    main()
