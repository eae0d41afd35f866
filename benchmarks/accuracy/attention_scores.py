"""Where attention goes, by token of the prompt (the paper's Figures 2 and 8 to 10), as JSON.

    python benchmarks/accuracy/attention_scores.py --videos 30

Method. Held-out videos of 96 sampled frames, their questions, Hugging Face's model in fp32
(``reader.py``), under full attention, PEVLM, and PEVLM with reused positions. An attention score is
what a query gives to a key after the softmax. It is averaged over layers, heads, and either all
queries of the text behind the video or the last one, whose logits are the answer's first token;
then over the questions of a video, and over videos. Keys are counted from the prompt's start; the
text behind the video has the place of its token there, so a mean has a score of 0 where a shorter
text has no token, and every distribution adds up to 1.

How far a method is from full attention is the total variation between its scores and full
attention's, 0 to 1, query by query, averaged as above: 0.1 says that a tenth of the attention goes
elsewhere. Intervals and the paired test over videos: ``answers.py``.

``results/attention_scores.json`` holds a card, for each kind of query and method the distribution,
its sums by part of the prompt and the distance with its interval, and the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.answers import interval, resampled, tested
from accuracy.card import MODEL, RESULTS, card
from accuracy.claims import Claim, judged
from accuracy.dataset import HELD_OUT_SCENES
from accuracy.evaluate import BLOCK_STEPS, SINK_STEPS, all_methods
from accuracy.methods import Method, Prompt
from accuracy.model import STEP_TOKENS
from accuracy.reader import THREADS, Case, Reader, held_out

METHODS = ("full", "pevlm_without_sp", "pevlm")
QUERIES = ("text", "last")
CLAIMS = (
    Claim(
        "early frames are sinks: a token of the first pair gets more than one behind the sink, "
        "under full attention (Figure 2 a)",
        otherwise="This small model keeps no attention sink in its first frames, so it cannot show "
        "what putting them into PEVLM's sink protects in a model that does.",
    ),
    Claim("reused positions give the sink's frames more than full attention does (Figure 2 b)"),
    Claim("reused positions give the other frames less than full attention does (Figure 2 b)"),
    Claim("reused positions are farther from full attention than sequential ones (Figure 2 c)"),
)
AVERAGE = 16  # tokens of the moving average in the figure: four frame pairs


class Scores:
    """Attention of the texts behind one video, under one method.

    Args:
        end: of the video.
        lengths: tokens of the texts.

    Attributes:
        layers: a list a layer, of one ``[heads, n, end + n]`` fp32 tensor a text of ``n`` tokens:
            what its queries give to the prompt's tokens up to the video's end and to its own.
    """

    def __init__(self, end: int, lengths: Sequence[int]) -> None:
        starts = np.cumsum([end, *lengths])
        self.rows = [slice(int(a), int(a) + n) for a, n in zip(starts, lengths, strict=False)]
        self.end = end
        self.layers: list[list[torch.Tensor]] = []

    def record(self, given: torch.Tensor) -> None:
        """Args: given: ``[1, heads, length, length]`` of a layer, texts one after the other."""
        self.layers.append(
            [
                torch.cat([given[0, :, rows, : self.end], given[0, :, rows, rows]], -1)
                for rows in self.rows
            ]
        )

    def mean(self, queries: str, size: int) -> np.ndarray:
        """``[size]`` float64: the distribution over keys, the mean of the texts'."""
        found = np.zeros(size)
        for text in zip(*self.layers, strict=True):
            of_text = torch.stack([_of(layer, queries) for layer in text]).double().mean((0, 1, 2))
            found[: len(of_text)] += of_text.numpy() / len(self.rows)
        return found

    def distance(self, other: Scores, queries: str) -> float:
        """Total variation, query by query."""
        found = [
            (_of(one, queries) - _of(two, queries)).abs().sum(-1).mean() / 2
            for mine, its in zip(self.layers, other.layers, strict=True)
            for one, two in zip(mine, its, strict=True)
        ]
        # Texts count the same, whatever their length.
        return float(torch.stack(found).mean())


def _of(given: torch.Tensor, queries: str) -> torch.Tensor:
    """Of a text's queries ``[heads, n, keys]``, those that are meant."""
    return given if queries == "text" else given[:, -1:]


@torch.no_grad()
def scores(reader: Reader, case: Case, method: Method) -> Scores:
    """Of all questions about a video."""
    texts = reader.texts(case.questions)
    end = len(reader.before) + len(case.features)
    found = Scores(end, [len(text) for text in texts])
    reader.logits(case.features, texts, method, found.record)
    return found


def parts(prompt: Prompt) -> dict[str, tuple[int, int]]:
    """Half-open ranges of tokens: the text before, the first frame pair, the sink's other frames,
    the frames after it, and the text behind."""
    start, first, sink = prompt.start, prompt.steps[0][1], prompt.steps[SINK_STEPS - 1][1]
    return {
        "text_before": (0, start),
        "first_frames": (start, first),
        "sink_frames": (first, sink),
        "other_frames": (sink, prompt.end),
        "text_behind": (prompt.end, prompt.length),
    }


def collect(
    reader: Reader, cases: Sequence[Case], methods: Mapping[str, Method], size: int
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Queries → method → ``distributions`` ``[videos, size]`` and ``distances`` ``[videos]``."""
    found: dict[str, Any] = {
        kind: {name: {"distributions": [], "distances": []} for name in methods} for kind in QUERIES
    }
    for case in cases:
        by_method = {name: scores(reader, case, method) for name, method in methods.items()}
        for kind in QUERIES:
            for name, own in by_method.items():
                found[kind][name]["distributions"].append(own.mean(kind, size))
                found[kind][name]["distances"].append(own.distance(by_method["full"], kind))
    return {
        kind: {name: {k: np.array(v) for k, v in own.items()} for name, own in by_name.items()}
        for kind, by_name in found.items()
    }


def mean(values: np.ndarray) -> dict[str, Any]:
    """Of videos, with its interval."""
    draws = resampled(np.mean, values)
    return {"mean": round(float(values.mean()), 4), "interval": interval(draws)}


def report(
    found: Mapping[str, Mapping[str, np.ndarray]], ranges: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Of one kind of queries."""
    methods = {
        name: {
            "distribution": [round(float(x), 7) for x in own["distributions"].mean(0)],
            "parts": {
                part: mean(own["distributions"][:, start:end].sum(1))
                for part, (start, end) in ranges.items()
            },
            "distance": mean(own["distances"]),
        }
        for name, own in found.items()
    }
    said = claims(found, ranges)
    return {"methods": methods, "claims": judged([*said], [tested(v) for v in said.values()])}


def claims(
    found: Mapping[str, Mapping[str, np.ndarray]], ranges: Mapping[str, tuple[int, int]]
) -> dict[Claim, np.ndarray]:
    """What the paper says of Figure 2 → ``[videos]``, what it says is above 0."""
    full, reused, ours = (found[name] for name in METHODS)

    def part(own: Mapping[str, np.ndarray], *names: str) -> np.ndarray:
        whole: np.ndarray = own["distributions"]
        return np.sum([whole[:, slice(*ranges[name])].sum(1) for name in names], axis=0)

    def a_token(own: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        start, end = ranges[name]
        return part(own, name) / (end - start)

    sink = ("first_frames", "sink_frames")
    values = (
        a_token(full, "first_frames") - a_token(full, "other_frames"),
        part(reused, *sink) - part(full, *sink),
        part(full, "other_frames") - part(reused, "other_frames"),
        reused["distances"] - ours["distances"],
    )
    return dict(zip(CLAIMS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--videos", type=int, default=30)
    parser.add_argument("--each", type=int, default=1, help="questions a task and video")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention_scores.json")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    reader = Reader(options.model)
    scenes = HELD_OUT_SCENES[-1]
    with tempfile.TemporaryDirectory() as work:
        cases = held_out(reader, options.videos, options.each, Path(work), (scenes,))
    longest = max(len(text) for case in cases for text in reader.texts(case.questions))
    prompt = reader.prompt(scenes, longest)
    ranges = parts(prompt)
    methods = {name: all_methods()[name] for name in METHODS}
    found = collect(reader, cases, methods, prompt.length)
    result: dict[str, Any] = {
        "card": card(
            options.model,
            frames=2 * scenes,
            videos=len(cases),
            questions=sum(len(case.questions) for case in cases),
        ),
        "moving_average_tokens": AVERAGE,
        "parts": ranges,
        "block_tokens": BLOCK_STEPS * STEP_TOKENS,
        "queries": {kind: report(by_name, ranges) for kind, by_name in found.items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for kind in QUERIES:
        for name, own in result["queries"][kind]["methods"].items():
            where = {part: value["mean"] for part, value in own["parts"].items()}
            print(kind, name, where, "distance", own["distance"]["mean"])


if __name__ == "__main__":
    main()
