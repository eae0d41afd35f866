"""Sessions: each turn sends what is new, and the answer is that of the whole conversation, sent at
once and computed by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from support.exchange import (
    SHARP,
    TOKEN_IDS,
    TOLERANCE,
    VIDEO,
    Answer,
    Exchange,
    Question,
    read_answer,
)
from support.families import internvl, longvila
from support.oracle import Setting

Clip = Callable[..., Path]

pytestmark = pytest.mark.server

families = pytest.mark.parametrize(
    ("exchange", "video", "streaming"),
    [
        ("chunk_257", VIDEO, False),
        ("longvila", longvila.VIDEO, False),
        ("llava_video", "<video>", False),
        ("streaming_sessions", VIDEO, True),
        ("qwen3_vl", VIDEO, False),
        ("internvl", internvl.VIDEO, False),
    ],
    indirect=["exchange"],
    scope="session",  # or each test starts its server
)
both = pytest.mark.parametrize(
    ("exchange", "streaming"),
    [("chunk_257", False), ("streaming_sessions", True)],
    indirect=["exchange"],
    scope="session",  # or each test starts its server
)
ordinary = pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)
streams = pytest.mark.parametrize("exchange", ["streaming_sessions"], indirect=True)
STOP = "<|im_end|>"
TURN, END = "<|im_start|>user\n", f"{STOP}\n"
QUESTION = f"Why?{END}<|im_start|>assistant\n"
SPARSE = Setting(4, 4)


@dataclass
class Session:
    """A conversation with a server, and all of it so far.

    Attributes:
        text: with ``<|im_end|>`` for each token of an answer that is part of it.
        answers: those tokens, by how many ``<|im_end|>`` stand before.
        rid: of the last turn; a streaming session takes none.
    """

    exchange: Exchange
    id: str
    setting: Setting | None
    streaming: bool = False
    text: str = ""
    videos: tuple[Path, ...] = ()
    answers: dict[int, int] = field(default_factory=dict)
    rid: str | None = None

    def post(self, text: str, *videos: Path, new_tokens: int = 0, **turn: Any) -> requests.Response:
        """A turn, as the server takes it; ``turn`` is of its ``session_params``."""
        setting = Question(text, setting=self.setting).override
        body: dict[str, Any] = {
            "text": text,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": new_tokens,
                "ignore_eos": True,
                "custom_params": {"pevlm": setting},
            },
            "session_params": {"id": self.id, **turn},
        }
        if videos:
            body["video_data"] = [str(video) for video in videos]
        if new_tokens:
            body |= {"return_logprob": True, "token_ids_logprob": list(TOKEN_IDS)}
        return self.exchange.server.post("/generate", body)

    def append(self, text: str, *videos: Path, new_tokens: int = 0) -> Answer:
        """A turn that goes on from the last one."""
        rid = {} if self.streaming or self.rid is None else {"rid": self.rid}
        reply = self.post(text, *videos, new_tokens=new_tokens, **rid)
        assert reply.status_code == 200, reply.text
        out = reply.json()
        self.rid = out["meta_info"]["id"]
        self.text += text
        self.videos += videos
        return read_answer(out)

    def keep(self, answer: Answer) -> None:
        """An answer becomes part of the conversation, as it does by itself on the server."""
        first = self.text.count(STOP)
        self.answers |= {first + i: token for i, token in enumerate(answer.tokens)}
        self.text += STOP * len(answer.tokens)

    def difference(self, answer: Answer, setting: Setting | None) -> float:
        """The largest of a log-probability to the oracle's, of the whole conversation."""
        inputs = self.exchange.inputs(Question(self.text, self.videos))
        ids = inputs["input_ids"][0]
        if self.answers:
            oracle: Any = self.exchange.oracle
            [stop] = oracle.processor.tokenizer(STOP).input_ids
            stops = (ids == stop).nonzero()
            for place, token in self.answers.items():
                ids[stops[place]] = token
        assert answer.prompt_tokens == len(ids)
        expected = self.exchange.oracle.logprobs(inputs, setting, answer.tokens)
        rows = expected[len(ids) - 1 : -1, list(TOKEN_IDS)]
        assert answer.logprobs.shape == rows.shape
        return float((answer.logprobs - rows).abs().max())

    def check(self, answer: Answer) -> None:
        assert self.difference(answer, self.setting) <= TOLERANCE

    def sparse_positions(self) -> int:
        """Tokens that attend to less than everything before them."""
        question = Question(self.text, self.videos, setting=self.setting)
        return len(self.exchange.sparse_positions(question)) if self.setting else 0


@contextmanager
def session(
    exchange: Exchange, setting: Setting | None, *, streaming: bool = False
) -> Iterator[Session]:
    exchange.flush()
    body = {"capacity_of_str_len": 100_000, "streaming": streaming}
    reply = exchange.server.post("/open_session", body)
    assert reply.status_code == 200, reply.text
    yield Session(exchange, reply.json(), setting, streaming)
    assert exchange.server.post("/close_session", {"session_id": reply.json()}).status_code == 200


@families
@pytest.mark.parametrize("setting", [SPARSE, None])
def test_clip_after_clip(
    exchange: Exchange, clip: Clip, video: str, streaming: bool, setting: Setting | None
) -> None:
    """Each is prefilled as it comes, and computed once."""
    with session(exchange, setting, streaming=streaming) as talk:
        before = exchange.totals()["sparse_tokens"]
        for number, seconds in enumerate((10, 22, 14)):
            talk.append(f"{TURN}{video}{END}", clip(seconds, number))
        answer = talk.append(QUESTION, new_tokens=3)
        talk.check(answer)
        assert talk.difference(answer, Setting(8, 4)) > SHARP / 2
        assert exchange.totals()["sparse_tokens"] - before == talk.sparse_positions()
        assert answer.cached_tokens > answer.prompt_tokens // 2


@both
def test_answers_in_between(exchange: Exchange, clip: Clip, streaming: bool) -> None:
    """They see everything, and later clips see them as text before their sink."""
    with session(exchange, SPARSE, streaming=streaming) as talk:
        for number in range(3):
            question = f"{TURN}{VIDEO}What now?{END}<|im_start|>assistant\n"
            answer = talk.append(question, clip(10, number), new_tokens=4)
            talk.check(answer)
            talk.keep(answer)
        talk.check(talk.append(f"{END}{TURN}{QUESTION}", new_tokens=3))


@ordinary
def test_questions_under_the_same_turn(exchange: Exchange, clip: Clip) -> None:
    """An ordinary session branches: each question sees the clips, and no other question."""
    with session(exchange, SPARSE) as talk:
        talk.append(f"{TURN}{VIDEO}{END}", clip(22))
        seen, rid = talk.text, talk.rid
        for question in (QUESTION, "What happens?" + QUESTION, QUESTION):
            talk.text, talk.rid = seen, rid
            talk.check(talk.append(question, new_tokens=3))


@ordinary
def test_another_setting_in_a_later_turn(exchange: Exchange, clip: Clip) -> None:
    """What it sees otherwise is computed anew."""
    with session(exchange, SPARSE) as talk:
        talk.append(f"{TURN}{VIDEO}{END}", clip(22))
        talk.setting = Setting(2, 6)
        answer = talk.append(QUESTION, new_tokens=3)
        talk.check(answer)
        assert answer.cached_tokens < 20


@streams
def test_another_setting_in_a_stream(exchange: Exchange, clip: Clip) -> None:
    """Its keys and values are its own, so it is refused; the session goes on."""
    with session(exchange, SPARSE, streaming=True) as talk:
        talk.append(f"{TURN}{VIDEO}{END}", clip(22))
        for talk.setting in (Setting(2, 6), None):
            reply = talk.post(QUESTION, new_tokens=3)
            assert reply.status_code == 400
            assert "this streaming session" in reply.text
        talk.setting = SPARSE
        talk.check(talk.append(QUESTION, new_tokens=3))


@ordinary
def test_an_offset_that_cuts_a_video(exchange: Exchange, clip: Clip) -> None:
    """HTTP 400, and the turn before it can still be asked."""
    with session(exchange, SPARSE) as talk:
        talk.append(f"{TURN}{VIDEO}{END}", clip(22))
        reply = talk.post(QUESTION, new_tokens=3, rid=talk.rid, offset=40)
        assert reply.status_code == 400
        assert "an offset cut short" in reply.text
        talk.check(talk.append(QUESTION, new_tokens=3))
