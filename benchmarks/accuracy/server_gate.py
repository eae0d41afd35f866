"""The accuracy gate: does a server answer under PEVLM as well as under full attention?

    python benchmarks/accuracy/server_gate.py

starts a server on the CPU; ``--url`` names one that runs already, launched with

    python -m sglang.launch_server --model-path benchmarks/accuracy/model \\
        --attention-backend pevlm --mm-process-config '{"video": {"min_pixels": 3136}}'

Method. Every question goes to the running server twice through its OpenAI API, for a greedy answer
under full attention (``"enabled": false``) and one under PEVLM with 16-frame sinks and blocks. An
answer is right when it is the right one to the last token and then ends. The videos are examples
(``dataset.EXAMPLE``) of 64 sampled frames, as H.264 files: natural ones, with questions of all
seven tasks, and those of ``edges.py``, where a boundary that is one step off shows.

The gate is green when

- PEVLM is not inferior to full attention by ``MEAN_MARGIN`` in the mean of the seven tasks: the
  whole 95 % interval of the difference is above it. The interval is over videos, since the answers
  about one video hang together;
- no group of questions, a task or one of ``edges.py``, loses more than ``GROUP_MARGIN``;
- full attention is ``MIN_SKILL`` above guessing in each group: below it, no loss could be seen;
- the server's counters say that PEVLM skipped pairs, and that full attention did not.

A server with a wrong mask is red: ``tests/server/test_accuracy_gate.py`` breaks it in four ways.

Ends with status 1 when the gate is red. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # `support` lives there

from accuracy.dataset import ANYWHERE, EXAMPLE, Clip, make_clip
from accuracy.edges import GROUPS, edge_clip
from accuracy.questions import CHANCE, TASKS
from machine import card, summary

from pevlm_sglang.tune.client import Client, about
from support.server import Server
from support.video import video_data_url

FRAMES = 16  # of the sink and of a block
SCENES = 32
NATURAL, EDGE = 32, 16  # videos
EACH = 3  # questions a task and natural video, where it allows them
MEAN_MARGIN, GROUP_MARGIN, MIN_SKILL = 0.07, 0.15, 0.3
FULL: dict[str, Any] = {"enabled": False}
PEVLM: dict[str, Any] = {"enabled": True, "sink_frames": FRAMES, "block_frames": FRAMES}
SERVER_FLAGS = ("--mm-process-config", '{"video": {"min_pixels": 3136}}')
"""Of a server of the small model: its frames of 56 x 56 pixels stay as they are."""

MODEL = Path(__file__).parent / "model"
_AT_ONCE = 4  # requests in flight
_MAX_TOKENS = 4  # an answer has at most two tokens, and the end
_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Item:
    """A question to the server.

    Attributes:
        video: its number.
        url: of the video, ``data:``.
        frames: as a request says it beside the video.
        group: a task, or one of ``edges.GROUPS``.
        text, answer: of the question.
    """

    video: int
    url: str
    group: str
    text: str
    answer: str
    frames: str | None = None


@dataclass(frozen=True)
class Difference:
    """PEVLM's score minus that of full attention.

    Attributes:
        mean: of the groups' differences.
        half_width: of its 95 % interval, over videos.
    """

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width


def items(work: Path, *, frames: str | None = None) -> list[Item]:
    """Every question of the gate.

    Args:
        work: directory for the video files.
        frames: ``keyframes`` = of the same videos in files that have some near the sampled frames,
            whose place they take.
    """
    clips: list[tuple[Clip, list[str]]] = []
    for number in range(NATURAL):
        clip = make_clip(EXAMPLE, SCENES, number, EACH)
        clips.append((clip, [question.task for question in clip.questions]))
    steps = FRAMES // 2
    for number in range(500, 500 + EDGE):
        edge = edge_clip(EXAMPLE, SCENES, number, sink=steps, block=steps)
        clips.append((edge.clip, edge.groups))
    found = []
    for video, (clip, groups) in enumerate(clips):
        url = video_data_url(
            clip.write(work) if frames is None else clip.write_keyed(work, ANYWHERE)
        )
        for group, question in zip(groups, clip.questions, strict=True):
            found.append(Item(video, url, group, question.text, question.answer, frames))
    return found


def answers(
    client: Client,
    asked: Sequence[Item],
    setting: Mapping[str, Any],
    *,
    namespace: str | None = None,
) -> list[bool]:
    """Which questions the server answers right.

    Args:
        setting: the request's value of ``custom_params["pevlm"]``.
        namespace: SGLang's ``extra_key``, whose requests share no cached prefix with others.
    """
    body: dict[str, Any] = {"custom_params": {"pevlm": dict(setting)}}
    if namespace is not None:
        body["extra_key"] = namespace

    def right(item: Item) -> bool:
        answer = client.api.chat.completions.create(
            model="small",
            messages=about(
                {"url": item.url, **({} if item.frames is None else {"frames": item.frames})},
                item.text,
            ),
            max_tokens=_MAX_TOKENS,
            temperature=0,
            extra_body=body,
        )
        choice = answer.choices[0]
        return choice.message.content == item.answer and choice.finish_reason == "stop"

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(right, asked))


class Comparison:
    """The same questions under full attention and under PEVLM.

    Args:
        asked: the questions.
        full, pevlm: which were answered right.
    """

    def __init__(self, asked: Sequence[Item], full: Sequence[bool], pevlm: Sequence[bool]) -> None:
        self.groups = [name for name in (*TASKS, *GROUPS) if any(i.group == name for i in asked)]
        row = {video: n for n, video in enumerate(sorted({item.video for item in asked}))}
        shape = (len(row), len(self.groups))
        self._asked, self._full, self._pevlm = (np.zeros(shape) for _ in range(3))
        for item, by_full, by_pevlm in zip(asked, full, pevlm, strict=True):
            where = row[item.video], self.groups.index(item.group)
            self._asked[where] += 1
            self._full[where] += by_full
            self._pevlm[where] += by_pevlm

    def number(self, group: str) -> int:
        """Questions of a group."""
        return int(self._asked[:, self.groups.index(group)].sum())

    def scores(self, group: str) -> tuple[float, float]:
        """Of full attention and of PEVLM, 0 to 1."""
        column = self.groups.index(group)
        number = self._asked[:, column].sum()
        return (
            float(self._full[:, column].sum() / number),
            float(self._pevlm[:, column].sum() / number),
        )

    def difference(self, groups: Iterable[str]) -> Difference:
        """The mean over groups; the interval is by linearisation over the videos that were asked
        something of these groups."""
        columns = [self.groups.index(group) for group in groups]
        asked = self._asked[:, columns]
        gained = (self._pevlm - self._full)[:, columns]
        gained, asked = gained[asked.any(1)], asked[asked.any(1)]
        mean = gained.sum(0) / asked.sum(0)
        shares = ((gained - asked * mean) / asked.sum(0)).mean(1)
        videos = len(shares)
        error = float(np.sqrt((shares**2).sum() * videos / max(1, videos - 1)))
        return Difference(float(mean.mean()), _Z * error)

    @property
    def overall(self) -> Difference:
        """Over the seven tasks, on natural videos."""
        return self.difference(TASKS)

    def failures(self) -> list[str]:
        """Why the gate is red; empty when it is green."""
        found = []
        overall = self.overall
        if overall.low <= -MEAN_MARGIN:
            found.append(
                f"mean of the tasks: expected a difference surely above {-100 * MEAN_MARGIN:.0f} "
                f"points, got {_points(overall)}"
            )
        for group in self.groups:
            full, pevlm = self.scores(group)
            if full < CHANCE[GROUPS.get(group, group)] + MIN_SKILL:
                found.append(f"{group}: full attention scores {full:.1%}, too little to judge by")
            if pevlm < full - GROUP_MARGIN:
                found.append(
                    f"{group}: expected at most {100 * GROUP_MARGIN:.0f} points below full "
                    f"attention's {full:.1%}, got {pevlm:.1%}"
                )
        return found

    def table(self) -> str:
        """A line a group, in Markdown."""
        lines = [
            "| questions | number | full attention | PEVLM | difference (95 % interval) |",
            "| --- | --- | --- | --- | --- |",
        ]
        for group in self.groups:
            full, pevlm = self.scores(group)
            difference = _points(self.difference([group]))
            lines.append(
                f"| {group} | {self.number(group)} | {full:.1%} | {pevlm:.1%} | {difference} |"
            )
        tasks = [self.scores(task) for task in TASKS]
        full, pevlm = (float(np.mean(scores)) for scores in zip(*tasks, strict=True))
        number = sum(self.number(task) for task in TASKS)
        lines.append(
            f"| mean of the tasks | {number} | {full:.1%} | {pevlm:.1%} | {_points(self.overall)} |"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Scores and their difference."""
        return {
            "scores": {group: [round(s, 4) for s in self.scores(group)] for group in self.groups},
            "difference": round(self.overall.mean, 4),
            "half_width": round(self.overall.half_width, 4),
        }


def _points(difference: Difference) -> str:
    low, high = difference.low, difference.mean + difference.half_width
    return f"{100 * difference.mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def run(client: Client, *, frames: str | None = None) -> tuple[Comparison, list[str]]:
    """The whole gate on one server.

    Args:
        frames: see :func:`items`.

    Returns:
        the scores, and why the gate is red; nothing when it is green
    """
    # A prefix that an earlier run left in the server's cache would hide what this one computes.
    namespace = f"gate-{np.random.default_rng().integers(2**40)}"
    with tempfile.TemporaryDirectory() as work:
        asked = items(Path(work), frames=frames)
    before = client.counters().pairs_saved
    full = answers(client, asked, FULL, namespace=namespace)
    between = client.counters().pairs_saved
    pevlm = answers(client, asked, PEVLM, namespace=namespace)
    compared = Comparison(asked, full, pevlm)
    failures = compared.failures()
    if between != before:
        failures.append(f"full attention skipped {between - before} pairs, expected none")
    if client.counters().pairs_saved == between:
        failures.append("PEVLM skipped no pair; see dense_tokens in /server_info for the reason")
    return compared, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a running server (default: one is started on the CPU)")
    parser.add_argument(
        "--frames", choices=["keyframes"], help="ask about keyframes near the sampled frames"
    )
    options = parser.parse_args()
    print(summary(card(torch.device("cpu"))), flush=True)
    with ExitStack() as stack:
        url = options.url
        if url is None:
            flags = ("--attention-backend", "pevlm", *SERVER_FLAGS)
            url = stack.enter_context(Server(MODEL, *flags)).url
        compared, failures = run(Client(url), frames=options.frames)
    print(compared.table(), "", *failures, "gate: " + ("red" if failures else "green"), sep="\n")
    print(json.dumps({**compared.as_json(), "failures": failures}))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
