"""Linear cost on a CPU: PEVLM's time per token over lengths, against the noise of a shared machine.

    python benchmarks/linear.py

Method. One attention layer of the tiny shape as in bench_attention.py, in one thread. What is
measured is the processor's time of this process, which waiting for others does not add to; the
lengths take turns, in rounds, and the shortest of a length's rounds counts: so a slow minute of the
machine hits all lengths and not one. A round of a length is at least 16k tokens, in several calls
where prompts are short. Freed memory stays with the process, as it does in PyTorch's allocator on a
GPU: glibc otherwise maps fresh, zeroed pages for every output beyond 32 MB, which alone makes
prompts of 32k tokens 8 % slower a token.

Three drifts come of it, each the furthest that a figure strays from its value at the shortest
length: of the time per token, which is the claim; of the pairs a token, since the tokens of the
sink see less than the others and weigh more in a short prompt; and of the time per pair, which is
what the machine adds.

Sample output, on two cores of a virtual machine that others kept busier than it has cores:

      tokens  ns a token  pairs a token  ns a pair
        4096        7422          480.5      15.45
        8192        7639          496.5      15.38
       16384        7931          504.5      15.72
       32768        7848          508.5      15.43
    drift of the time per token: 6.9%, drift of the pairs per token: 5.8%, drift of the time per
    pair: 1.8%
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from machine import card, summary
from peers import sparse_peers
from workload import MODELS, Prompt

FRAMES, TOKENS_PER_FRAME = (16, 16), 16
LENGTHS = (4_096, 8_192, 16_384, 32_768)
ROUNDS, ROUND_TOKENS = 12, 16_384
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
FIGURES = {
    "time per token": "ns_per_token",
    "pairs per token": "pairs_per_token",
    "time per pair": "ns_per_pair",
}


def drift_of(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How far each of ``FIGURES`` strays from the shortest length's, as a share of it.

    Args:
        rows: one a length, with ``length``, ``ns_per_token`` and ``ns_per_pair``.
    """
    ordered = sorted(rows, key=lambda row: row["length"])
    for row in ordered:
        row.setdefault("pairs_per_token", row["ns_per_token"] / row["ns_per_pair"])
    return {
        name: max(abs(row[figure] / ordered[0][figure] - 1) for row in ordered)
        for name, figure in FIGURES.items()
    }


def measure_linear(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row a length; ``quick`` takes fewer and shorter ones."""
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rows(LENGTHS[:2] if quick else LENGTHS, 2 if quick else ROUNDS)
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """See the top of this file; for the rest of the process. Where the C library is another than
    glibc, nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _rows(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    shape, attention = MODELS["tiny"], sparse_peers(torch.device("cpu"))["pevlm sdpa"]
    torch.manual_seed(0)
    prompts = {length: Prompt.of_video(length, *FRAMES, TOKENS_PER_FRAME) for length in lengths}

    def draw(length: int, heads: int) -> torch.Tensor:
        return torch.randn(length, heads, shape.head_dim)

    calls = {
        length: partial(
            attention,
            draw(length, shape.num_q_heads),
            draw(length, shape.num_kv_heads),
            draw(length, shape.num_kv_heads),
            prompt,
        )
        for length, prompt in prompts.items()
    }
    best = dict.fromkeys(lengths, float("inf"))
    for _ in range(rounds):
        for length, call in calls.items():
            times = -(-ROUND_TOKENS // length)
            call()  # its plan and its memory
            start = time.process_time()
            for _ in range(times):
                call()
            best[length] = min(best[length], (time.process_time() - start) / times)
    return [
        {
            "length": length,
            "ns_per_token": best[length] / length * 1e9,
            "pairs_per_token": prompt.pairs / length,
            "ns_per_pair": best[length] / prompt.pairs * 1e9,
        }
        for length, prompt in prompts.items()
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(summary(card(torch.device("cpu"))))
    rows = measure_linear()
    print(f"{'tokens':>8}{'ns a token':>12}{'pairs a token':>15}{'ns a pair':>11}")
    for row in rows:
        pairs, pair = row["pairs_per_token"], row["ns_per_pair"]
        print(f"{row['length']:>8}{row['ns_per_token']:>12.0f}{pairs:>15.1f}{pair:>11.2f}")
    print(", ".join(f"drift of the {name}: {share:.1%}" for name, share in drift_of(rows).items()))


if __name__ == "__main__":
    main()
