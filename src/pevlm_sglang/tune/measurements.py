"""Every question under every setting, on empty caches, one request at a time; what has been
measured is kept from run to run, one line a (setting, question)."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pevlm_sglang.settings.config import PevlmConfig
from pevlm_sglang.tune.client import SERVER_INFO_KEY, Answer, Client, ServerError, Token, Work
from pevlm_sglang.tune.questions import Question

_SERVER_OPTIONS = (
    *("model_path", "weight_version", "dtype", "quantization", "kv_cache_dtype", "device"),
    *("tp_size", "dp_size", "chunked_prefill_size", "mm_process_config", "chat_template"),
)
_PEVLM_OPTIONS = ("base_backend", "prefill_kernel", "image_runs")


@dataclass(frozen=True)
class Setting:
    """PEVLM's options of a request, in sampled frames; both None, ``FULL``, is full attention."""

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
        return {"enabled": False} if self.is_full else dataclasses.asdict(self)


FULL = Setting()


@dataclass(frozen=True)
class Measurement:
    """One question, by its ``key``, under one setting: what came, and what the server computed."""

    setting: Setting
    question: str
    answer: Answer
    work: Work

    @classmethod
    def parse(cls, line: bytes) -> Measurement:
        """Inverse of ``asdict`` as JSON; ValueError, KeyError or TypeError where it is none."""
        content = json.loads(line)
        answer = content["answer"]
        answer["tokens"] = tuple(Token(**token) for token in answer["tokens"])
        setting, work = Setting(**content["setting"]), Work(**content["work"])
        return cls(setting, content["question"], Answer(**answer), work)


class Measurements:
    """The finished ones of a directory, in ``done`` by (setting, question)."""

    def __init__(self, file: BinaryIO, done: dict[tuple[Setting, str], Measurement]) -> None:
        self.done = done
        self._file = file

    def add(self, measurement: Measurement) -> None:
        """Written when this returns."""
        line = json.dumps(dataclasses.asdict(measurement)).encode()
        self._file.write(line + b"\n")  # unbuffered: one write, whole or torn
        self.done[measurement.setting, measurement.question] = measurement
        os.fsync(self._file.fileno())

    def missing(
        self, questions: Sequence[Question], settings: Sequence[Setting]
    ) -> list[tuple[Setting, Question]]:
        """What is still to measure, in order.

        A question goes through all settings before the next begins, so that an interrupted sweep
        has measured all settings on the same questions. Questions are shuffled, so that it has seen
        different videos, and each begins with another setting, so that a drift of the machine's
        speed falls on all alike. The order depends on the questions and settings alone.
        """
        return [
            (setting, question)
            for turn, question in enumerate(random.Random(0).sample(questions, len(questions)))
            for setting in (settings[(i + turn) % len(settings)] for i in range(len(settings)))
            if (setting, question.key) not in self.done
        ]


@contextmanager
def open_measurements(directory: Path, server: Mapping[str, Any]) -> Iterator[Measurements]:
    """The measurements in a directory, which is made where it is missing, and locked meanwhile. A
    torn last line, of a run that was killed while it wrote, is cut off.

    Raises:
        ValueError: another run writes there; those there are of another server, as
            :func:`describe_server` has it; a bad line.
    """
    path = directory / "measurements.jsonl"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{directory}: another run is writing there") from None
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
        done = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                one = Measurement.parse(line)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: expected a measurement, got {line[:60]!r}; mend or "
                    "remove the line"
                ) from None
            done[one.setting, one.question] = one
        _check_server(directory / "server.json", server, bool(done))
        yield Measurements(file, done)


def _check_server(path: Path, server: Mapping[str, Any], has_any: bool) -> None:
    """Measurements of different servers never stand in one directory."""
    try:
        before = json.loads(path.read_text()) if has_any else server
    except (OSError, ValueError):
        raise ValueError(
            f"{path}: expected the description of the server that the measurements beside it are "
            "of, got none; use another --output"
        ) from None
    for name in {**before, **server}:
        then, now = before.get(name), server.get(name)
        if then != now:
            raise ValueError(
                f"{path.parent}: what is there was measured with {name} = {json.dumps(then)}, "
                f"this run has {json.dumps(now)}; use another --output"
            )
    path.write_text(json.dumps(server, indent=2) + "\n")


def describe_server(info: dict[str, Any], max_tokens: int, *, embed_videos: bool) -> dict[str, Any]:
    """What the measurements depend on beside setting and question, JSON-ready; ``info`` is
    ``/server_info`` of a server with PEVLM, the others are of the requests."""
    pevlm = info[SERVER_INFO_KEY]
    return {
        "sglang_version": info.get("version"),
        **{name: info.get(name) for name in _SERVER_OPTIONS},
        **{f"pevlm_{name}": pevlm[name] for name in _PEVLM_OPTIONS},
        "frames_per_step": pevlm["frames_per_step"],
        "max_tokens": max_tokens,
        "embed_videos": embed_videos,
    }


def make_settings(
    sink_frames: Sequence[int], block_frames: Sequence[int], frames_per_step: int
) -> list[Setting]:
    """Full attention, and every pair of sink and block sizes.

    Raises:
        ValueError: a size out of range, given twice, or not in whole steps of the server's model.
    """
    for name, sizes in (("sink_frames", sink_frames), ("block_frames", block_frames)):
        for size in sizes:
            PevlmConfig().override({name: size})
            if size % frames_per_step:
                raise ValueError(
                    f"{name}: expected multiples of {frames_per_step}, for the server's model "
                    f"merges {frames_per_step} sampled frames into one step, got {size}"
                )
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"{name}: expected each size once, got {' '.join(map(str, sizes))}")
    return [FULL, *(Setting(sink, block) for sink in sink_frames for block in block_frames)]


def sweep(
    client: Client,
    todo: Sequence[tuple[Setting, Question]],
    measured: Measurements,
    *,
    total: int,
    max_tokens: int,
) -> None:
    """Measure what is ``missing``, and add each when it is finished; ``total`` is of all runs.

    Each setting's first request is asked once before, unmeasured: kernels are compiled and tuned
    then.

    Raises:
        ServerError: the server fails or refuses, or did not compute what was asked for.
    """
    from tqdm import tqdm

    warm: set[Setting] = set()
    with tqdm(total=total, initial=total - len(todo), unit="measurement") as bar:
        for setting, question in todo:
            bar.set_postfix_str(setting.name, refresh=False)
            if setting not in warm:
                _measure(client, setting, question, max_tokens)
                warm.add(setting)
            measured.add(_measure(client, setting, question, max_tokens))
            bar.update()


def _measure(client: Client, setting: Setting, question: Question, max_tokens: int) -> Measurement:
    answer, work = client.measure(
        question.video,
        question.text,
        setting={"enabled": True, **setting.options},
        max_tokens=max_tokens,
        top_logprobs=20,
    )
    if problem := _problem(setting, answer, work):
        raise ServerError(f"{setting.name}, {question.video}, {question.text!r}: {problem}")
    return Measurement(setting, question.key, answer, work)


def _problem(setting: Setting, answer: Answer, work: Work) -> str | None:
    """Why a request was not what it is meant to be."""
    from pevlm_sglang.observe import observer  # imports torch, seconds of a start

    if not work.is_whole_prompt(answer.prompt_tokens):
        return (
            f"expected a prefill of {answer.prompt_tokens} tokens and nothing else, got "
            f"{work.pairs_computed + work.pairs_saved} attention pairs; a measured server must "
            "have no other traffic"
        )
    if not work.vision_runs:
        return (
            "the vision tower did not run, though caches were flushed: the server's PEVLM is older "
            "and leaves SGLang's cache of video embeddings alone; update it"
        )
    if setting.is_full:
        return "full attention saved attention pairs" if work.pairs_saved else None
    expected = (observer.GLOBAL_TOKEN, observer.SHORT_VIDEO)
    others = {why: n for why, n in work.dense_tokens.items() if n and why not in expected}
    return f"PEVLM left tokens to full attention: {others}" if others else None
