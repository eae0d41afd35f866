"""What has been measured: one line a (setting, question), kept from run to run."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pevlm_sglang.tune.client import Answer, Token, Work

MEASUREMENTS_FILE = "measurements.jsonl"
SERVER_FILE = "server.json"


@dataclass(frozen=True)
class Setting:
    """PEVLM's options of a request; ``FULL`` is full attention.

    Attributes:
        sink_frames, block_frames: sampled frames; both None for full attention.
    """

    sink_frames: int | None = None
    block_frames: int | None = None

    @property
    def is_full(self) -> bool:
        return self.sink_frames is None

    @property
    def name(self) -> str:
        return "full attention" if self.is_full else f"{self.sink_frames} / {self.block_frames}"

    @property
    def in_words(self) -> str:
        if self.is_full:
            return self.name
        return f"a sink of {self.sink_frames} and blocks of {self.block_frames} frames"

    @property
    def options(self) -> dict[str, Any]:
        """As a request and a preset take them."""
        if self.is_full:
            return {"enabled": False}
        return {"sink_frames": self.sink_frames, "block_frames": self.block_frames}


FULL = Setting()


@dataclass(frozen=True)
class Measurement:
    """One question under one setting.

    Attributes:
        setting: of the request.
        question: ``Question.key``.
        answer: what came.
        work: what the server computed for it.
    """

    setting: Setting
    question: str
    answer: Answer
    work: Work

    def line(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Measurement:
        """Inverse of ``line``.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        content = json.loads(line)
        answer = content["answer"]
        tokens = tuple(Token(**token) for token in answer["tokens"])
        return cls(
            Setting(**content["setting"]),
            content["question"],
            Answer(**{**answer, "tokens": tokens}),
            Work(**content["work"]),
        )


class Measurements:
    """The finished ones of a directory; ``add`` has written one when it returns.

    Attributes:
        done: by (setting, question).
    """

    def __init__(self, file: BinaryIO, done: dict[tuple[Setting, str], Measurement]) -> None:
        self.done = done
        self._file = file

    def add(self, measurement: Measurement) -> None:
        self._file.write(measurement.line())  # unbuffered: one write, whole or torn
        self.done[measurement.setting, measurement.question] = measurement
        os.fsync(self._file.fileno())


@contextmanager
def open_measurements(directory: Path, server: Mapping[str, Any]) -> Iterator[Measurements]:
    """The measurements in a directory, which is made where it is missing, and locked meanwhile.

    A torn last line, of a run that was killed while it wrote, is cut off.

    Args:
        directory: of ``measurements.jsonl`` and ``server.json``.
        server: what the figures depend on beside setting and question, JSON-ready.

    Raises:
        ValueError: another run writes there; those there are of another server; a bad line.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / MEASUREMENTS_FILE).open("a+b", buffering=0)
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{directory}: another run is writing there") from None
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
        done = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                one = Measurement.parse(line)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{directory / MEASUREMENTS_FILE}, line {number}: expected a measurement, got "
                    f"{line[:60]!r}; mend or remove the line"
                ) from None
            done[one.setting, one.question] = one
        _check_server(directory / SERVER_FILE, server, bool(done))
        yield Measurements(file, done)


def _check_server(path: Path, server: Mapping[str, Any], has_any: bool) -> None:
    """Measurements of different servers never stand in one directory."""
    if has_any:
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"{path}: expected the description of the server that the measurements beside it "
                "are of, got none; use another --output"
            ) from None
        for name in {**before, **server}:
            then, now = before.get(name), server.get(name)
            if then != now:
                raise ValueError(
                    f"{path.parent}: what is there was measured with {name} = {json.dumps(then)}, "
                    f"this run has {json.dumps(now)}; use another --output"
                )
    path.write_text(json.dumps(server, indent=2) + "\n")
