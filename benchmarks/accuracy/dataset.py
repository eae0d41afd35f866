"""Video files with questions and answers, drawn from seeds: what a model is asked.

    python benchmarks/accuracy/dataset.py DIRECTORY --videos 4 --scenes 32

writes H.264 files and ``questions.jsonl``, a line a question: ``video`` (a path relative to that
file), ``question``, ``answer``, and ``task`` and ``frames`` for tables. Training, validation, test
sets and examples never share a video: the split is the first word of every seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.questions import TASKS, Question, ask
from accuracy.videos import FPS, World, make_world, render_world, write_mp4

TRAIN, VALIDATION, HELD_OUT, EXAMPLE = 1, 2, 3, 4
"""The splits. ``EXAMPLE`` is for the demo, ``pevlm tune`` and tests: nothing is tuned on
``HELD_OUT``."""

HELD = 8  # frames of a picture in a file with keyframes
ANYWHERE, AT_CUTS = 7, 16  # and frames from one of them to the next
HELD_OUT_SCENES = (32, 48)  # 64 and 96 sampled frames: never trained on


@dataclass(frozen=True)
class Clip:
    """A video and what is asked about it.

    Attributes:
        split, number: with the length, its seed.
        world: what it shows.
        questions: no two alike.
    """

    split: int
    number: int
    world: World
    questions: list[Question]

    @property
    def frames(self) -> int:
        """Sampled frames, at two a second."""
        return 2 * len(self.world)

    def write(self, directory: Path, fps: float = FPS) -> Path:
        """The H.264 file, ``SCENES-NUMBER.mp4``, of ``fps`` frames a second; written anew."""
        seed = self.split * 10**6 + len(self.world) * 10**3 + self.number
        path = directory / f"{len(self.world)}-{self.number}.mp4"
        return write_mp4(path, render_world(self.world, seed=seed), fps)

    def write_keyed(self, directory: Path, group: int) -> Path:
        """The same video as a file of sixteen frames a second, of which two a second are sampled:
        each picture eight times.

        Args:
            group: frames from a keyframe to the next. ``ANYWHERE`` = near the sampled frames, and
                as far before as after them, up to half of what is between two; ``AT_CUTS`` = where
                a scene begins.
        """
        seed = self.split * 10**6 + len(self.world) * 10**3 + self.number
        path = directory / f"{len(self.world)}-{self.number}-every-{group}.mp4"
        frames = render_world(self.world, seed=seed).repeat_interleave(HELD, 0)
        return write_mp4(path, frames, HELD * FPS, group)


def make_clip(
    split: int, scenes: int, number: int, each: int, tasks: Sequence[str] = TASKS
) -> Clip:
    """A video of ``scenes`` seconds with up to ``each`` questions a task, as far as it allows."""
    rng = np.random.default_rng((split, scenes, number))
    world = make_world(rng, scenes)
    asked: dict[str, Question] = {}
    for task in tasks:
        for _ in range(each):
            question = ask(rng, world, task)
            if question is not None:
                asked[question.text] = question
    return Clip(split, number, world, [*asked.values()])


def write_questions(clips: Iterable[Clip], directory: Path) -> Path:
    """The video files and ``questions.jsonl``.

    Returns:
        the latter's path
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "questions.jsonl"
    with path.open("w") as file:
        for clip in clips:
            video = clip.write(directory)
            for question in clip.questions:
                line = {
                    "video": video.name,
                    "question": question.text,
                    "answer": question.answer,
                    "task": question.task,
                    "frames": clip.frames,
                }
                file.write(json.dumps(line) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--videos", type=int, default=4, help="of each length")
    parser.add_argument("--scenes", type=int, nargs="+", default=[32], help="seconds of a video")
    parser.add_argument("--each", type=int, default=1, help="questions a task and video")
    options = parser.parse_args()
    clips = (
        make_clip(EXAMPLE, scenes, number, options.each)
        for scenes in options.scenes
        for number in range(options.videos)
    )
    print(write_questions(clips, options.directory))


if __name__ == "__main__":
    main()
