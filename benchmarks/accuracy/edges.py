"""Videos whose events stand where a wrong mask shows.

A mask that is one step off hardly changes a mean over natural videos: only a few of their events
stand next to the first scene of a block. Here the scenes of a video are put in another order, so
that each event that occurs once is the second scene or the last of a context block, and the code is
in a late block. What is asked is the scene just before the event (``cross``): in the same block
under the right mask, and so as easy as under full attention, but in another block where the blocks
begin a step later (``SECOND``) or a step earlier (``LAST``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from accuracy.dataset import Clip
from accuracy.questions import ask, cross_at
from accuracy.videos import CODE, FILLERS, World, make_world

SECOND = "cross, second scene of a block"
LAST = "cross, last scene of a block"
LATE_CODE = "code in the last block"
GROUPS = {SECOND: "cross", LAST: "cross", LATE_CODE: "code"}
"""Group of questions → task."""


@dataclass(frozen=True)
class EdgeClip:
    """A video with the questions of each group, in the order of ``groups``.

    Attributes:
        clip: the video, with the questions.
        groups: keys of ``GROUPS``, one a question.
    """

    clip: Clip
    groups: list[str]


def edge_clip(split: int, scenes: int, number: int, *, sink: int, block: int) -> EdgeClip:
    """One video and all its questions.

    Args:
        scenes: of the video: the sink and at least two whole blocks.
        number: of the video in its split; distinct from those of other clips of that length.
        sink, block: scenes (steps) of each.
    """
    rng = np.random.default_rng((split, scenes, number))
    world = make_world(rng, scenes)
    first_of_last = scenes - block
    groups = dict.fromkeys(range(sink + block + 1, scenes, block), SECOND)
    groups |= dict.fromkeys(range(sink + block - 1, scenes, block), LAST)
    late = [scene for scene in range(first_of_last, scenes) if not {scene, scene + 1} & {*groups}]
    wanted = {CODE: int(rng.choice(late))}
    counts = np.bincount(world.shapes, minlength=CODE)
    once = [shape for shape in range(len(FILLERS), CODE) if counts[shape] == 1]
    places = rng.permutation([*groups])
    wanted |= {shape: int(scene) for shape, scene in zip(once, places, strict=False)}
    world = _put(world, wanted)
    asked = [(LATE_CODE, ask(rng, world, "code"))]
    for shape, scene in wanted.items():
        if shape != CODE:
            asked += [(groups[scene], cross_at(world, scene, kind)) for kind in ("Colour", "Place")]
    questions = [question for _, question in asked if question is not None]
    return EdgeClip(Clip(split, number, world, questions), [group for group, _ in asked])


def _put(world: World, wanted: dict[int, int]) -> World:
    """The world with scenes swapped so that each shape of ``wanted`` is where it says."""
    order = np.arange(len(world))
    for shape, scene in wanted.items():
        [at] = np.flatnonzero(world.shapes[order] == shape)
        order[[at, scene]] = order[[scene, at]]
    return World(world.shapes[order], world.colours[order], world.places[order], world.code)
