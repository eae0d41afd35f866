"""Broken requests, each from a number, and what a server makes of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import requests

from support.server import Server

# Of SGLang's chat endpoint, HTTP 500 where it is no mapping: its request model looks into it before
# any hook.
UPSTREAMS = ("response_format",)
TIME_LIMIT = 30.0  # seconds a request
CHECK_EVERY = 25  # requests, after which the server answers a sound one
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.5, 2**31, -(2**31), 2**63, 2**64, 10**9),
    *(1e308, -1e308, 1e-320, float("nan"), float("inf")),
    *("", "a", "0", "NaN", "\x00", "\ud800", "x" * 5000, "/dev/null", "/", "file:///", "data:,"),
    *([], {}, [[]], [{}], [None], [0], [-1], ["a"], [[0], ["a"]], {"": None}, {"a": {"b": [1]}}),
    *([0] * 2000, {"id": {}}, {"id": "x", "rid": {}}, {"url": None}, {"type": "text"}),
)


def nested(depth: int, *, mapping: bool) -> Any:
    """Lists in lists, or objects in objects."""
    value: Any = None
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


@dataclass(frozen=True)
class Base:
    """A sound request, and the names of all fields that its endpoint knows.

    Attributes:
        fields: where (keys from the root) → names.
    """

    path: str
    body: Mapping[str, Any]
    fields: Mapping[tuple[str, ...], Sequence[str]]


def known_fields(path: str) -> dict[tuple[str, ...], Sequence[str]]:
    """Of the request models of this SGLang."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    if path == "/generate":
        sampling = SamplingParams.__struct_fields__
        names = [entry.name for entry in dataclasses.fields(GenerateReqInput)]
        return {(): names, ("sampling_params",): list(sampling)}
    return {(): [name for name in ChatCompletionRequest.model_fields if name not in UPSTREAMS]}


def mutated(number: int, bases: Sequence[Base]) -> tuple[str, str]:
    """The path and the JSON text of a broken request.

    Args:
        number: of the request.
        bases: one of them is broken, in one to three places.
    """
    chance = random.Random(number)
    base = chance.choice(bases)
    body: Any = copy.deepcopy(dict(base.body))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if chance.random() < 0.5:
            at = chance.choice([*base.fields])
            target = body
            for key in at:
                target = target.get(key) if isinstance(target, dict) else None
            if isinstance(target, dict):
                target[chance.choice(base.fields[at])] = _strange(chance)
        else:
            places = [*_places(body)]
            holder, key = chance.choice(places)
            if chance.random() < 0.15:
                del holder[key]
            else:
                holder[key] = _strange(chance)
    text = json.dumps(body)
    if chance.random() < 0.03:
        text = text[: chance.randrange(len(text))]
    return base.path, text


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) in a JSON value."""
    if isinstance(value, dict):
        keys: list[Any] = [*value]
    elif isinstance(value, list):
        keys = [*range(len(value))]
    else:
        return []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _strange(chance: random.Random) -> Any:
    if chance.random() < 0.05:
        return nested(chance.choice([10, 100, 400]), mapping=chance.random() < 0.5)
    value = copy.deepcopy(chance.choice(STRANGE))
    return [value] * chance.choice([1, 2]) if chance.random() < 0.1 else value


@dataclass
class Report:
    """What the requests came to.

    Attributes:
        statuses: HTTP status, or what else happened → how often.
        failures: number of a request → what was wrong.
        memory: name of a process → bytes after a quarter of the requests and at the end.
    """

    statuses: Counter[int | str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    def describe(self) -> str:
        lines = [
            f"{self.statuses.total()} requests in {self.seconds:.0f} s: {dict(self.statuses)}",
            *(
                f"memory of {name}, MiB after a quarter and at the end: "
                f"{quarter / 2**20:.1f}, {end / 2**20:.1f}"
                for name, (quarter, end) in self.memory.items()
            ),
            *(f"request {number}: {what}" for number, what in self.failures.items()),
        ]
        return "\n".join(lines)


def fuzz(
    server: Server,
    bases: Sequence[Base],
    numbers: Sequence[int],
    is_well: Callable[[], bool],
    *,
    most_failures: int = 10,
) -> Report:
    """Send broken requests one by one: each must be refused with 4xx, or answered, in time.

    Args:
        numbers: of the requests.
        is_well: whether the server answers a sound question right.
        most_failures: end it earlier.
    """
    report, began = Report(), time.monotonic()
    processes = {"launcher": psutil.Process(server.pid)}
    processes |= {child.name(): child for child in processes["launcher"].children(recursive=True)}
    quarter: dict[str, int] = {}
    for count, number in enumerate(numbers):
        path, text = mutated(number, bases)
        problem = _problem(server, path, text, report.statuses)
        if (
            problem is None
            and (count % CHECK_EVERY == 0 or number == numbers[-1])
            and not is_well()
        ):
            problem = "afterwards a sound question gets a wrong answer, or none"
        if problem is None and not all(_size(process) for process in processes.values()):
            problem = "a process is gone"
        if problem is not None:
            report.failures[number] = f"{problem}\n  {path} {text[:600]}"
            if len(report.failures) >= most_failures or not server.alive():
                break
        if count == len(numbers) // 4:
            quarter = {name: _size(process) for name, process in processes.items()}
    for name, before in quarter.items():
        report.memory[name] = before, _size(processes[name])
    report.seconds = time.monotonic() - began
    return report


def _size(process: psutil.Process) -> int:
    """Bytes of resident memory; none of a process that is gone."""
    try:
        rss: int = process.memory_info().rss
    except psutil.Error:
        return 0
    return rss


def _problem(server: Server, path: str, text: str, statuses: Counter[int | str]) -> str | None:
    try:
        response = requests.post(
            server.url + path,
            data=text.encode(),
            headers={"Content-Type": "application/json"},
            timeout=TIME_LIMIT,
        )
    except requests.Timeout:
        statuses["timeout"] += 1
        return f"no answer in {TIME_LIMIT:g} s"
    except requests.RequestException as error:
        statuses["no answer"] += 1
        return f"no answer: {error}"
    statuses[response.status_code] += 1
    if response.status_code >= 500:
        return f"HTTP {response.status_code}: {response.text[:300]}"
    return None
