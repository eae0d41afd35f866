"""Many clients at once on a server that every kind of disturbance visits, for a bounded time.

What is asked is known: each question was asked alone before (:func:`ask_alone`), and whatever the
server says under load must be the same, a broken-off answer its beginning.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from support.exchange import TOKEN_IDS, TOLERANCE, Answer, Exchange, Question, read_answer
from support.server import Server
from support.soak_tools import Gate, Memory

CLIENTS = 24
NEAR_TIE = 1e-3  # a greedy token that leads by less may change with the order of additions
HANG = 120.0  # seconds without an answer
DISTURBANCE = 2.0  # seconds between two of them
GROWTH = 1.02
"""Of a process's memory, from the second quarter to the last."""

SHORT, SHORT_GROWTH = 120, 1.05
"""A soak of fewer seconds sees the allocators' own swings: once 1.026 in a minute, no leak."""
FAILURES = 20  # end a soak early


@dataclass(frozen=True)
class Known:
    """A question, and what the server says to it when nobody else asks.

    Attributes:
        answer: with the log-probabilities of all its positions from 0.
    """

    question: Question
    answer: Answer


def body(question: Question, **fields: Any) -> dict[str, Any]:
    """Of ``/generate``; ``fields`` besides."""
    return {
        "text": question.text,
        "video_data": [str(video) for video in question.videos] or None,
        "image_data": [str(image) for image in question.images] or None,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": question.new_tokens,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "custom_params": {"pevlm": question.override} if question.override else {},
        },
        **fields,
    }


def with_logprobs(start: int) -> dict[str, Any]:
    """Fields of a request that wants them from a position on; -1: of the answer alone."""
    return {
        "return_logprob": True,
        "logprob_start_len": start,
        "token_ids_logprob": list(TOKEN_IDS),
    }


def ask_alone(exchange: Exchange, questions: Sequence[Question]) -> list[Known]:
    """Ask one by one, on an empty cache, and compare with the oracle. Questions whose answer hangs
    on a near tie are left out.

    Raises:
        AssertionError: an answer that is not the oracle's.
    """
    known = []
    for question in questions:
        exchange.flush()
        out = exchange.server.generate(**body(question, **with_logprobs(0), top_logprobs_num=2))
        answer = read_answer(out)
        exchange.compare([question], [answer])
        tops = out["meta_info"]["output_top_logprobs"]
        if min(first[0] - second[0] for first, second in tops) > NEAR_TIE:
            known.append(Known(question, answer))
    return known


@dataclass
class Report:
    """What a soak saw.

    Attributes:
        requests: sent, by kind.
        statuses: HTTP statuses, by kind of request.
        compared: answers that were compared, whole and broken-off.
        logprobs: compared log-probabilities.
        failures: in words; empty where all is well.
        memory: name of a process → median bytes of its resident memory in each quarter.
        seconds: that it took.
    """

    requests: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    logprobs: int = 0
    failures: list[str] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def describe(self) -> str:
        lines = [
            f"{self.requests.total()} requests in {self.seconds:.0f} s: {dict(self.requests)}",
            f"statuses: { {f'{kind} {code}': n for (kind, code), n in self.statuses.items()} }",
            f"compared: {dict(self.compared)}, {self.logprobs} log-probabilities",
        ]
        for name, quarters in self.memory.items():
            sizes = ", ".join(f"{size / 2**20:.1f}" for size in quarters)
            lines.append(f"memory of {name}, MiB a quarter: {sizes}")
        return "\n".join([*lines, *self.failures])


class Soak:
    """Args:
    server: running.
    known: what to ask.
    bad: ``/generate`` bodies that must be refused with HTTP 400.
    seconds: for which new requests are sent.
    most_requests: ends it earlier.
    most_failures: end it earlier too.
    seed: of all choices.
    """

    def __init__(
        self,
        server: Server,
        known: Sequence[Known],
        bad: Sequence[Mapping[str, Any]],
        *,
        seconds: float,
        most_requests: int = 100_000,
        most_failures: int = FAILURES,
        seed: int = 0,
    ) -> None:
        self._url, self._pid = server.url, server.pid
        self._known, self._bad = known, bad
        self._seconds, self._most_requests, self._seed = seconds, most_requests, seed
        self._most_failures = most_failures
        self._lock = threading.Lock()
        self._gate = Gate()
        self._over = threading.Event()
        self._report = Report()

    def run(self) -> Report:
        """Ends by itself: when the time is up, plus what the last answers take."""
        began = time.monotonic()
        memory = Memory(self._pid)
        threads = [
            threading.Thread(target=self._client, args=(number,), daemon=True)
            for number in range(CLIENTS)
        ]
        threads.append(threading.Thread(target=self._disturb, daemon=True))
        for thread in threads:
            thread.start()
        while time.monotonic() - began < self._seconds and not self._over.wait(0.5):
            memory.sample()
        self._over.set()
        deadline = time.monotonic() + 2 * HANG
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        if alive := sum(thread.is_alive() for thread in threads):
            self._fail(f"{alive} clients are still waiting")
        self._report.memory = memory.quarters()
        self._report.seconds = time.monotonic() - began
        return self._report

    # --- Clients ------------------------------------------------------------------------------

    def _client(self, number: int) -> None:
        chance = random.Random(f"{self._seed}-{number}")
        kinds: dict[Callable[..., None], int] = {
            self._ask: 60,
            self._stream: 10,
            self._hang_up: 10,
            self._abort: 10,
            self._ask_badly: 10,
        }
        with requests.Session() as session:
            session.trust_env = False
            while not self._over.is_set():
                [kind] = chance.choices([*kinds], [*kinds.values()])
                with self._gate.through():
                    self._one(kind, session, chance)

    def _one(self, kind: Callable[..., None], session: requests.Session, chance: Any) -> None:
        name = kind.__name__.lstrip("_")
        with self._lock:
            self._report.requests[name] += 1
            if self._report.requests.total() >= self._most_requests:
                self._over.set()
        try:
            kind(session, chance)
        except (OSError, KeyError, ValueError) as error:
            self._fail(f"{name}: {type(error).__name__}: {error}")

    def _post(
        self, session: requests.Session, kind: str, sent: Mapping[str, Any], **options: Any
    ) -> requests.Response:
        """Counts the status, of which 5xx is a failure."""
        response = session.post(self._url + "/generate", json=sent, timeout=HANG, **options)
        self._count(kind, response)
        return response

    def _count(self, kind: str, response: requests.Response) -> None:
        with self._lock:
            self._report.statuses[kind, response.status_code] += 1
        if response.status_code >= 500:
            self._fail(f"{kind}: HTTP {response.status_code}: {response.text[:300]}")

    def _choose(self, chance: Any) -> tuple[Known, dict[str, Any]]:
        return chance.choice(self._known), {"priority": chance.randrange(4)}

    def _ask(self, session: requests.Session, chance: Any) -> None:
        known, fields = self._choose(chance)
        end = known.answer.prompt_tokens
        start = chance.choice([None, None, -1, 0, chance.randrange(end), end - 1])
        if start is not None:
            fields |= with_logprobs(start)
        response = self._post(session, "ask", body(known.question, **fields))
        if response.status_code != 200:
            self._fail(f"ask: HTTP {response.status_code}: {response.text[:300]}")
            return
        answer = read_answer(response.json())
        self._compare(known, answer.tokens, whole=True)
        if answer.text != known.answer.text:
            self._fail(f"{known.question}: expected {known.answer.text!r}, got {answer.text!r}")
        if start is not None:
            self._compare_logprobs(known, answer, end - 1 if start < 0 else start)

    def _stream(self, session: requests.Session, chance: Any) -> None:
        known, fields = self._choose(chance)
        last = None
        for last in self._events(session, "stream", body(known.question, stream=True, **fields)):
            self._compare(known, last["output_ids"], whole=False)
        if last is None or last["meta_info"]["finish_reason"]["type"] != "length":
            self._fail(f"stream: expected an end by length, got {last}")
        else:
            self._compare(known, last["output_ids"], whole=True)

    def _hang_up(self, session: requests.Session, chance: Any) -> None:
        """Before the first event, or after some."""
        known, fields = self._choose(chance)
        sent = body(known.question, stream=True, **fields)
        most = chance.randrange(4)
        if not most:
            connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=HANG)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/generate", json.dumps(sent), headers)
            time.sleep(chance.choice([0.0, 0.1, 0.3]))
            connection.close()
            return
        for count, event in enumerate(self._events(session, "hang_up", sent), 1):
            self._compare(known, event["output_ids"], whole=False)
            if count == most:
                return

    def _abort(self, session: requests.Session, chance: Any) -> None:
        known, fields = self._choose(chance)
        rid = f"abort-{chance.getrandbits(64):x}"
        cancel = threading.Timer(chance.choice([0.0, 0.05, 0.3, 1.0]), self._cancel, [rid])
        cancel.start()
        last = None
        sent = body(known.question, rid=rid, stream=True, **fields)
        for last in self._events(session, "abort", sent):
            if "output_ids" in last:
                self._compare(known, last["output_ids"], whole=False)
        cancel.join()
        reason = (last or {}).get("meta_info", {}).get("finish_reason") or {}
        if reason.get("type") not in ("abort", "length"):
            self._fail(f"abort: expected an end by abort or length, got {last}")

    def _cancel(self, rid: str) -> None:
        try:
            response = requests.post(self._url + "/abort_request", json={"rid": rid}, timeout=HANG)
        except requests.RequestException as error:
            self._fail(f"abort_request: {error}")
        else:
            self._count("abort_request", response)

    def _ask_badly(self, session: requests.Session, chance: Any) -> None:
        sent = chance.choice(self._bad)
        response = self._post(session, "ask_badly", sent)
        if response.status_code != 400:
            self._fail(f"ask_badly: expected 400, got {response.status_code}: {sent}")

    def _events(
        self, session: requests.Session, kind: str, sent: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        with self._post(session, kind, sent, stream=True) as response:
            if response.status_code != 200:
                self._fail(f"{kind}: HTTP {response.status_code}: {response.text[:300]}")
                return
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    # --- Disturbances -------------------------------------------------------------------------

    def _disturb(self) -> None:
        chance = random.Random(f"{self._seed}-disturb")
        kinds = (self._pause, self._pause, self._flush_busy, self._flush_idle)
        with requests.Session() as session:
            session.trust_env = False
            while not self._over.wait(DISTURBANCE):
                self._one(chance.choice(kinds), session, chance)

    def _control(self, session: requests.Session, path: str, *allowed: int, **sent: Any) -> None:
        response = session.post(self._url + path, json=sent, timeout=HANG)
        self._count(path.partition("?")[0].lstrip("/"), response)
        if response.status_code not in allowed:
            self._fail(f"{path} {sent}: HTTP {response.status_code}: {response.text[:300]}")

    def _pause(self, session: requests.Session, chance: Any) -> None:
        """In place, or with everything back in the queue, the cache then flushed or not."""
        mode = chance.choice(["in_place", "retract"])
        self._control(session, "/pause_generation", 200, mode=mode)
        time.sleep(chance.choice([0.0, 0.2, 0.5]))
        if chance.random() < 0.5:
            self._control(session, "/flush_cache", 200, 400)
        self._control(session, "/continue_generation", 200)

    def _flush_busy(self, session: requests.Session, _chance: Any) -> None:
        """Refused, where a request is under way."""
        self._control(session, "/flush_cache", 200, 400)

    def _flush_idle(self, session: requests.Session, _chance: Any) -> None:
        with self._gate.closed():
            self._control(session, "/flush_cache?timeout=30", 200)

    # --- Judgement ----------------------------------------------------------------------------

    def _compare(self, known: Known, tokens: Sequence[int], *, whole: bool) -> None:
        """Tokens, because SGLang streams text piece by piece, and bytes that are no character yet,
        which a random model is full of, not always as it would decode them at once."""
        expected = known.answer.tokens
        with self._lock:
            self._report.compared["whole" if whole else "beginnings"] += 1
        if tuple(tokens) != (expected if whole else expected[: len(tokens)]):
            self._fail(f"{known.question}: expected tokens {expected}, got {tuple(tokens)}")

    def _compare_logprobs(self, known: Known, answer: Answer, start: int) -> None:
        expected = known.answer.logprobs[start:]
        if answer.logprobs.shape != expected.shape:
            self._fail(f"{known.question} from {start}: {answer.logprobs.shape} log-probabilities")
            return
        difference = float((answer.logprobs - expected).abs().max())
        with self._lock:
            self._report.logprobs += expected.numel()
        if not difference <= TOLERANCE:
            self._fail(f"{known.question} from {start}: log-probabilities differ by {difference}")

    def _fail(self, what: str) -> None:
        with self._lock:
            self._report.failures.append(what)
            if len(self._report.failures) >= self._most_failures:
                self._over.set()


def check(report: Report, *, answers: int, seconds: float) -> None:
    """Raises:
    AssertionError: a failure, growth, or fewer whole answers than that.
    """
    growth = GROWTH if seconds >= SHORT else SHORT_GROWTH
    assert not report.failures, report.describe()
    assert report.compared["whole"] >= answers, report.describe()
    for name, (_, second, _, last) in report.memory.items():
        assert last <= growth * second, f"{name} grows\n{report.describe()}"


def videos_bad(clip: Path, directory: Path) -> list[Path]:
    """Files that are no videos any more."""
    content = clip.read_bytes()
    files = {"corrupt.mp4": content[:3000] + bytes(3000), "empty.mp4": b"", "text.mp4": b"text"}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return [directory / name for name in files]
