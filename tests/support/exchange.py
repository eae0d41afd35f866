"""Questions to a server, and whether it answers them as the oracle does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support.oracle import Oracle, Setting
from support.server import Server

TOLERANCE = 1e-4  # of a log-probability, in fp32; what is measured is 1e-5
SHARP = 1e-2  # a wrong mask differs by more than this in some log-probability
TOKEN_IDS = tuple(range(0, 300, 7))  # whose log-probabilities are compared, at every position
DEFAULT = Setting(16, 16)  # of a server that was started with no PEVLM option
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def user(text: str) -> str:
    """A user's turn, up to where the answer starts."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Sampled:
    """A video with wishes about its sampling: ``fps``, ``max_frames``, ``max_pixels``."""

    path: Path
    wishes: Mapping[str, float]


@dataclass(frozen=True)
class Question:
    """A request, in the form that both sides take.

    Attributes:
        text: the prompt, with one placeholder a video or image.
        videos, images: files, in the order of their placeholders.
        setting: of PEVLM; None is full attention. The server's default travels as no override.
        start: first position whose log-probabilities are wanted. SGLang takes no cached prefix
            beyond it, so with the prompt in its cache it is where the hit ends.
        new_tokens: tokens to generate.
    """

    text: str
    videos: tuple[Path | Sampled, ...] = ()
    images: tuple[Path, ...] = ()
    setting: Setting | None = DEFAULT
    start: int = 0
    new_tokens: int = 3

    @property
    def override(self) -> dict[str, Any]:
        """The value of ``custom_params["pevlm"]``."""
        if self.setting is None:
            return {"enabled": False}
        return {
            name: value
            for name, value in vars(self.setting).items()
            if value != getattr(DEFAULT, name)
        }


def about(
    video: Path | Sampled, text: str = "What happens in the video?", **fields: Any
) -> Question:
    """A question about one video, which stands before the text; ``fields`` of the question."""
    return Question(SYSTEM + user(VIDEO + text), (video,), **fields)


@dataclass(frozen=True)
class Answer:
    """What the server said.

    Attributes:
        logprobs: ``[positions, TOKEN_IDS]``, of the tokens that follow positions ``start`` up to
            the last but one of the whole sequence; none where the server was not asked for them.
        tokens: the generated ones.
        text: the generated tokens, decoded.
        prompt_tokens, cached_tokens: lengths of the prompt and of its prefix in the cache.
    """

    logprobs: torch.Tensor
    tokens: tuple[int, ...]
    text: str
    prompt_tokens: int
    cached_tokens: int


class Exchange:
    """A server and the oracle that it has to equal.

    Args:
        server: running, with ``BATCH_ENV`` in its environment.
        oracle: of the server's model.
    """

    def __init__(self, server: Server, oracle: Oracle) -> None:
        self.server = server
        self.oracle = oracle

    def ask(self, *questions: Question, logprobs: bool = True) -> list[Answer]:
        """Send questions as one batch: the scheduler sees all of them at once."""
        body: dict[str, list[Any]] = {
            "text": [q.text for q in questions],
            "video_data": [[_sent(video) for video in q.videos] or None for q in questions],
            "image_data": [[str(image) for image in q.images] for q in questions],
            "sampling_params": [
                {
                    "temperature": 0,
                    "max_new_tokens": q.new_tokens,
                    "ignore_eos": True,
                    "skip_special_tokens": False,
                    "custom_params": {"pevlm": q.override} if q.override else {},
                }
                for q in questions
            ],
        }
        if logprobs:
            body |= {
                "return_logprob": [True] * len(questions),
                "logprob_start_len": [q.start for q in questions],
                "token_ids_logprob": [list(TOKEN_IDS)] * len(questions),
            }
        return [read_answer(out) for out in self.server.generate_batch(body)]

    def difference(self, question: Question, answer: Answer, setting: Setting | None) -> float:
        """The largest difference of a log-probability to the oracle's under ``setting``."""
        expected = self.expected(question, answer, setting)[question.start :, list(TOKEN_IDS)]
        assert answer.logprobs.shape == expected.shape
        return float((answer.logprobs - expected).abs().max())

    def expected(self, question: Question, answer: Answer, setting: Setting | None) -> torch.Tensor:
        """``[prompt + answer - 1, vocabulary]`` log-probabilities of the oracle, given the
        server's own answer."""
        inputs = self.inputs(question)
        assert inputs["input_ids"].shape[1] == answer.prompt_tokens
        return self.oracle.logprobs(inputs, setting, answer.tokens)[:-1]

    def sparse_positions(self, question: Question) -> list[int]:
        """Positions of the prompt that attend to less than everything before them."""
        inputs = self.inputs(question)
        mask = self.oracle.mask(inputs, question.setting, inputs["input_ids"].shape[1])
        return [q for q, row in enumerate(mask) if row.sum() < q + 1]

    def totals(self) -> dict[str, Any]:
        """The server's own count of what PEVLM did, over all replicas."""
        states = [state["pevlm"] for state in self.server.info()["internal_states"]]
        return {
            name: (
                sum((Counter(state[name]) for state in states), Counter())
                if isinstance(total, dict)
                else sum(state[name] for state in states)
            )
            for name, total in states[0].items()
        }

    def check(self, *questions: Question) -> list[Answer]:
        """Ask in one batch; every answer must equal the oracle's, and PEVLM must have computed
        each sparse token that the cache did not hold, and no other.

        Raises:
            AssertionError: says which question, and by how much.
        """
        before = self.totals()["sparse_tokens"]
        answers = self.ask(*questions)
        computed = self.totals()["sparse_tokens"] - before
        self.compare(questions, answers)
        expected = sum(
            position >= answer.cached_tokens
            for question, answer in zip(questions, answers, strict=True)
            for position in self.sparse_positions(question)
        )
        assert computed == expected, f"sparse tokens: expected {expected}, got {computed}"
        return answers

    def compare(self, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
        """See :meth:`check`."""
        for question, answer in zip(questions, answers, strict=True):
            difference = self.difference(question, answer, question.setting)
            assert difference <= TOLERANCE, (
                f"{question}: expected log-probabilities within {TOLERANCE} of the oracle's, "
                f"got a difference of {difference}"
            )

    def check_greedy(self, question: Question, answer: Answer) -> None:
        """An answer without log-probabilities: each token must be the oracle's likeliest.

        Raises:
            AssertionError: says which token.
        """
        expected = self.expected(question, answer, question.setting)[answer.prompt_tokens - 1 :]
        assert len(answer.tokens) == question.new_tokens
        for i, (token, row) in enumerate(zip(answer.tokens, expected, strict=True)):
            assert row[token] >= row.max() - TOLERANCE, f"token {i} of the answer to {question}"

    def flush(self) -> None:
        """Empty the server's prefix cache."""
        assert self.server.post("/flush_cache?timeout=30").status_code == 200

    def inputs(self, question: Question) -> Any:
        """The question as the oracle takes it."""
        from PIL import Image

        images = [Image.open(image).convert("RGB") for image in question.images]
        videos: Any = question.videos  # an oracle of another family takes paths alone
        return self.oracle.inputs(question.text, videos, images)


BATCH_ENV = {"SGLANG_ENABLE_COLOCATED_BATCH_GEN": "true"}
"""Makes SGLang hold the requests of a list back until the last of them is there."""


def _sent(video: Path | Sampled) -> str | dict[str, Any]:
    if isinstance(video, Sampled):
        return {"url": str(video.path), **video.wishes}
    return str(video)


def read_answer(out: Mapping[str, Any]) -> Answer:
    """What ``/generate`` said, with ``token_ids_logprob`` of ``TOKEN_IDS`` or without."""
    info = out["meta_info"]
    rows = [
        *info.get("input_token_ids_logprobs", ())[1:],
        *info.get("output_token_ids_logprobs", ()),
    ]
    return Answer(
        logprobs=torch.tensor([[entry[0] for entry in row] for row in rows]),
        tokens=tuple(out["output_ids"]),
        text=out["text"],
        prompt_tokens=info["prompt_tokens"],
        cached_tokens=info["cached_tokens"],
    )
