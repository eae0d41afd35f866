"""Questions about a video, with one right answer each that follows from what it shows.

Seven tasks, which need different things of attention:

- ``code``: read the two digits that one scene of the video shows (needle, OCR);
- ``time``: colour or place of what was shown a number of seconds before the end;
- ``order``: which of two events came first;
- ``count``: how often an event occurs in the whole video, 0 to 3;
- ``cross``: colour or place of what was shown just before an event, one scene earlier;
- ``occurrence``: colour or place of the first or the last of several events of a kind;
- ``find``: colour or place of an event that occurs once, the step that the last two build on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from accuracy.videos import CODE, COLOURS, EVENTS, FILLERS, MAX_COUNT, PLACES, World

TASKS = ("code", "time", "order", "count", "cross", "occurrence", "find")
COLOUR_NAMES = tuple(COLOURS)
CHANCE = {"code": 0.01, "time": 5 / 24, "order": 0.5, "count": 0.25, "cross": 5 / 24}
CHANCE["occurrence"] = CHANCE["find"] = CHANCE["time"]
MAX_SCENES = 64
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty")
NUMBERS = (*_UNITS, *(ten + unit for ten in _TENS for unit in ("", *_UNITS[1:10])))[:MAX_SCENES]


@dataclass(frozen=True)
class Question:
    """Attributes: task: of ``TASKS``. text: asked. answer: right, in full."""

    task: str
    text: str
    answer: str


def ask(rng: np.random.Generator, world: World, task: str) -> Question | None:
    """A question of a task; None where the video does not allow one."""
    return {
        "code": _code,
        "time": _time,
        "order": _order,
        "count": _count,
        "cross": _cross,
        "occurrence": _occurrence,
        "find": _find,
    }[task](rng, world)


def _code(rng: np.random.Generator, world: World) -> Question:
    return Question("code", "Code?", "{}{}".format(*world.code))


def _time(rng: np.random.Generator, world: World) -> Question:
    scene = int(rng.choice(np.flatnonzero(world.shapes != CODE)))
    kind, answer = _attribute(rng, world, scene)
    ago = NUMBERS[len(world) - 1 - scene]
    return Question("time", f"{kind} {ago} seconds ago?", answer)


def _order(rng: np.random.Generator, world: World) -> Question | None:
    once = _events(world, 1, 1)
    if len(once) < 2:
        return None
    pair = rng.choice(once, 2, replace=False)
    first = min(pair, key=lambda event: _scenes(world, event)[0])
    one, other = (EVENTS[event] for event in pair)
    return Question("order", f"{one} or {other} first?", EVENTS[first])


def _count(rng: np.random.Generator, world: World) -> Question:
    """The answer is drawn first, so that the counts are balanced as far as the video allows."""
    for count in rng.permutation(MAX_COUNT + 1):
        if events := _events(world, count, count):
            event = int(rng.choice(events))
            return Question("count", f"How many {EVENTS[event]}?", str(count))
    raise AssertionError("every event has a count")


def _cross(rng: np.random.Generator, world: World) -> Question | None:
    scenes = [int(_scenes(world, event)[0]) for event in _events(world, 1, 1)]
    scenes = [scene for scene in scenes if scene and world.shapes[scene - 1] != CODE]
    if not scenes:
        return None
    scene = int(rng.choice(scenes))
    return cross_at(world, scene, _kind(rng, world)[0])


def cross_at(world: World, scene: int, kind: str) -> Question:
    """The question of ``cross`` about one scene.

    Args:
        scene: of an event that occurs once; the scene before it is not that of the code.
        kind: "Colour" or "Place".
    """
    values = world.colours if kind == "Colour" else world.places
    event = EVENTS[world.shapes[scene] - len(FILLERS)]
    return Question("cross", f"{kind} before {event}?", _name(kind, int(values[scene - 1])))


def _find(rng: np.random.Generator, world: World) -> Question | None:
    once = _events(world, 1, 1)
    if not once:
        return None
    event = int(rng.choice(once))
    kind, answer = _attribute(rng, world, int(_scenes(world, event)[0]))
    return Question("find", f"{kind} of {EVENTS[event]}?", answer)


def _occurrence(rng: np.random.Generator, world: World) -> Question | None:
    """Of events whose first and last differ in what is asked for."""
    which = int(rng.integers(2))
    kind, values = _kind(rng, world)
    events = [
        event
        for event in _events(world, 2, MAX_COUNT)
        if values[_scenes(world, event)[0]] != values[_scenes(world, event)[-1]]
    ]
    if not events:
        return None
    event = int(rng.choice(events))
    answer = _name(kind, int(values[_scenes(world, event)[-which]]))
    order = ("first", "last")[which]
    return Question("occurrence", f"{kind} of {order} {EVENTS[event]}?", answer)


def _scenes(world: World, event: int) -> np.ndarray:
    return np.flatnonzero(world.shapes == event + len(FILLERS))


def _events(world: World, low: int, high: int) -> list[int]:
    """Events that occur ``low`` to ``high`` times."""
    counts = np.bincount(world.shapes, minlength=CODE + 1)[len(FILLERS) : CODE]
    return [int(event) for event in np.flatnonzero((counts >= low) & (counts <= high))]


def _kind(rng: np.random.Generator, world: World) -> tuple[str, np.ndarray]:
    return ("Colour", world.colours) if rng.integers(2) else ("Place", world.places)


def _name(kind: str, value: int) -> str:
    return COLOUR_NAMES[value] if kind == "Colour" else PLACES[value]


def _attribute(rng: np.random.Generator, world: World, scene: int) -> tuple[str, str]:
    kind, values = _kind(rng, world)
    return kind, _name(kind, int(values[scene]))


def vocabulary() -> list[str]:
    """Every text that a question or an answer can be made of, for the tokenizer."""
    texts = [
        *("Code?", "Colour of first", "Place of last", "How many", "or seconds ago before"),
        " or",
        "system\nYou are a helpful assistant.\nuser\nassistant\n",
    ]
    texts += [f" {number}" for number in NUMBERS]
    texts += [f" {event}" for event in EVENTS]
    texts += [*EVENTS, *COLOUR_NAMES, *PLACES]
    return texts
