"""How SGLang cuts, batches and repeats a prefill leaves no trace in the log-probabilities.

Each case is compared with the oracle, and so with every other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from support.exchange import IMAGE, SYSTEM, TOLERANCE, Exchange, Question, about, user
from support.oracle import Setting

Clip = Callable[..., Path]

pytestmark = pytest.mark.server

TEXT = Question(SYSTEM + user("Say something."))


@contextmanager
def lines_of(exchange: Exchange) -> Iterator[list[str]]:
    """The server's log lines of the block, once it is over."""
    lines: list[str] = []
    before = len(exchange.server.log())
    yield lines
    lines += exchange.server.log()[before:].splitlines()


def numbers(lines: list[str], pattern: str) -> list[int]:
    """What the pattern's group matches in the lines."""
    return [int(match[1]) for line in lines if (match := re.search(pattern, line))]


FLAGS = {
    "chunk_257": {"disable_overlap_schedule": False, "page_size": 1, "chunked_prefill_size": 257},
    "mixed_page_16": {
        "disable_overlap_schedule": True,
        "enable_mixed_chunk": True,
        "page_size": 16,
        "chunked_prefill_size": 64,
    },
    "one_chunk": {"disable_radix_cache": True, "chunked_prefill_size": 8192},
    "qwen2_vl_retracting": {"disable_radix_cache": True, "chunked_prefill_size": 257},
    "triton": {"attention_backend": "triton", "chunked_prefill_size": 64},
    "two_ranks_retracting": {"tp_size": 2, "chunked_prefill_size": 8192},
}


@pytest.mark.parametrize("exchange", FLAGS, indirect=True)
def test_chunks(exchange: Exchange, clip: Clip, request: pytest.FixtureRequest) -> None:
    """SGLang kept the flags that make these servers different, and cut the prompt accordingly."""
    info = exchange.server.info()
    expected = FLAGS[request.node.callspec.params["exchange"]]
    assert {name: info[name] for name in expected} == expected
    question = about(clip(24), setting=Setting(4, 6))
    before = exchange.totals()["sparse_forwards"]
    exchange.check(question)
    chunk = info["chunked_prefill_size"]
    chunks = {position // chunk for position in exchange.sparse_positions(question)}
    assert exchange.totals()["sparse_forwards"] - before == len(chunks)


@pytest.mark.parametrize("exchange", ["chunk_257", "mixed_page_16", "one_chunk"], indirect=True)
def test_batch_of_several_requests(
    exchange: Exchange, clip: Clip, picture: Callable[[int], Path]
) -> None:
    questions = (
        about(clip(5), setting=Setting(2, 2)),
        TEXT,
        Question(SYSTEM + user(IMAGE + "What is it?"), images=(picture(5),), setting=Setting(0, 2)),
        about(clip(9, seed=1), setting=Setting(0, 6)),
        about(clip(4, seed=2), setting=None),
    )
    with lines_of(exchange) as lines:
        together = exchange.check(*questions)
    room = exchange.server.info()["chunked_prefill_size"] // 32  # requests that fit into a chunk
    assert max(numbers(lines, r"PEVLM prefill batch, #req: (\d+)")) >= min(3, room)
    for question, answer in zip(questions, together, strict=True):
        [alone] = exchange.check(question)
        assert alone.tokens == answer.tokens
        assert (alone.logprobs - answer.logprobs).abs().max() <= TOLERANCE


def _counted(exchange: Exchange) -> int:
    totals = exchange.totals()
    return int(totals["sparse_tokens"]) + sum(totals["dense_tokens"].values())


@pytest.mark.parametrize("exchange", ["mixed_page_16"], indirect=True)
def test_decode_row_beside_a_prefill(exchange: Exchange, clip: Clip) -> None:
    """SGLang mixes no request that asks for log-probabilities: so the tokens are compared, and then
    the keys and values that mixed forwards have left in the cache."""
    short = about(clip(4), setting=Setting(0, 2), new_tokens=40)
    long = about(clip(40), setting=Setting(4, 6))
    exchange.flush()
    before = _counted(exchange)
    with lines_of(exchange) as lines:
        answers = exchange.ask(short, long, logprobs=False)
    prefilled = sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)
    assert _counted(exchange) - before == prefilled, "decode rows are no prefill"
    mixed = numbers(lines, r"PEVLM prefill batch, #req: (2),")
    assert len(mixed) >= answers[1].prompt_tokens // 64 - 2  # two chunks hold the short prompt
    for question, answer in zip((short, long), answers, strict=True):
        exchange.check_greedy(question, answer)
        start = exchange.sparse_positions(question)[-1] + 1
        [cached] = exchange.check(replace(question, start=start, new_tokens=3))
        assert cached.cached_tokens == start // 16 * 16


@pytest.mark.parametrize("exchange", ["qwen2_vl_retracting", "two_ranks_retracting"], indirect=True)
def test_retraction(exchange: Exchange, clip: Clip) -> None:
    """A retracted request prefills again, generated tokens included; where there is a prefix cache,
    from ``start`` on, inside a block."""
    questions = (
        about(clip(12), setting=Setting(4, 4), start=100, new_tokens=12),
        about(clip(9, seed=1), setting=Setting(0, 6), start=100, new_tokens=12),
        replace(TEXT, new_tokens=12),
    )
    sparse = [exchange.sparse_positions(question) for question in questions]
    assert {99, 100} <= set(sparse[0]) & set(sparse[1])
    exchange.flush()
    before = exchange.totals()["sparse_tokens"]
    with lines_of(exchange) as lines:
        answers = exchange.ask(*questions)
    exchange.compare(questions, answers)
    assert sum(numbers(lines, r"Testing retraction.*#retracted_reqs: (\d+)")) >= 2
    assert exchange.totals()["sparse_tokens"] - before > sum(map(len, sparse))
