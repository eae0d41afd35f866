"""One attention layer: PEVLM beside the best full attention of the same machine.

    python benchmarks/bench_attention.py                 # a GPU: up to 1M tokens, about 4 minutes
    python benchmarks/bench_attention.py --quick         # about a minute
    python benchmarks/bench_attention.py                 # without one: PyTorch on the CPU, to 16k

Method. q, k and v are normal random numbers with the heads of a released model; the prompt is a
system prompt, a video of 256 tokens a frame and a question of 64 tokens (benchmarks/workload.py).
Three sweeps: over lengths, over models at 100k tokens, and the paper's, over sink and block sizes
at 100k tokens. In each cell all peers run one after the other on the same tensors; a time is the
median of the calls within 0.4 s (a quarter of a second in the last two sweeps), on a GPU between
CUDA events, after one that is not counted; where a call takes longer, it is the time of one. On a
CPU it is the shortest, of processor time in one thread, since what others run there only ever adds.
Plans are built in the first call, as a model builds them for its first layer. Each release of
FlashAttention that knows the GPU is a peer of its own. The last two sweeps, and lengths beyond
200k, take what was fastest at 100k tokens: one full attention, and of the sparse ones the best
three.

- A gate comes first: rows of every output, at the same length, against the definition in fp64. An
  error above twice that of plain PyTorch has no time in the table, and the program ends with 1.
- TFLOP/s counts useful work: 4 * head_dim for each pair of query and key that the mask allows.
- Speed-up is against the fastest full attention of the cell, whoever ships it.
- ``of the ratio`` is the speed-up over what the arithmetic allows, 1 / visible_fraction.
- A peer that cannot run here is listed with its reason, and so is a cell that no time was left for.
  The JSON is written after every cell, the most wanted ones first: a run that is cut short keeps
  what it has.
- ``drift`` is how far the time per token strays from that of the shortest prompt of at least 50k
  tokens: what linear cost means. The pairs a token stray too, since the tokens of the sink see less
  than the others: by 6.1 % between 50k and 1M tokens. Their drift is printed beside it, and the
  drift of the time per pair, which no arithmetic excuses. On a CPU, benchmarks/linear.py measures
  these with care.

Sample output of ``--quick``, on two cores that others kept six times as busy as they are:

    model    tokens sink block  kernel                      ms  TFLOP/s speed-up of the ratio
    tiny             1024    -     -  torch flash               6.71     0.08
    tiny             1024   16    16  pevlm sdpa                6.76     0.06    0.99x         75%
    tiny             2048    -     -  torch flash              22.12     0.10
    tiny             2048   16    16  pevlm sdpa               14.82     0.06    1.49x         65%
    tiny             4096    -     -  torch flash              79.73     0.11
    tiny             4096   16    16  pevlm sdpa               36.81     0.05    2.17x         51%
    drift of pevlm sdpa: time per token 3.2%, pairs per token 3.3%, time per pair 0.1%
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gate import worst_ratio
from linear import drift_of, measure_linear
from machine import card, one_call, one_thread, seconds, summary, write_json
from peers import Attention, dense_peers, missing, release_of, sparse_peers
from workload import MODELS, TOKENS_PER_FRAME, Prompt, Shape, flops

PAPER = (16, 16)  # sink and block frames
PAPER_MODEL = "Qwen2.5-VL-7B"
AT = 100_000
LONG = (50_000, 262_144, 524_288, 1_048_576)
SHORT = (32_768, 16_384, 8_192)
SINKS, BLOCKS = (0, 1, 2, 4, 8, 16), (2, 4, 8, 12, 16, 24)
ONE_DENSE_FROM = 200_000  # from here on, full attention is the peer that was fastest before
KEPT = 3  # sparse peers, after the first cell
FLEX_AT = (32_768, AT)  # compiled anew for each length
LINEAR_FROM = 50_000
CPU_LENGTHS, CPU_TOKENS_PER_FRAME = (1_024, 2_048, 4_096, 8_192, 16_384), 16


QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Cell(NamedTuple):
    sweep: str
    model: str
    length: int
    sink_frames: int
    block_frames: int


def cells(device: torch.device, quick: bool) -> Iterator[Cell]:
    """What to measure, the most wanted first."""
    if device.type == "cpu":
        for length in CPU_LENGTHS[:-2] if quick else CPU_LENGTHS:
            yield Cell("length", "tiny", length, *PAPER)
        return
    for length in (AT, LONG[0], LONG[1]) if quick else (AT, *LONG):
        yield Cell("length", PAPER_MODEL, length, *PAPER)
    models = [name for name in MODELS if name not in ("tiny", PAPER_MODEL)]
    for model in models[:1] if quick else models:
        yield Cell("model", model, AT, *PAPER)
    for sink in (0, 16) if quick else SINKS:
        for block in (2, 16) if quick else BLOCKS:
            yield Cell("paper", PAPER_MODEL, AT, sink, block)
    for length in SHORT[-1:] if quick else SHORT:
        yield Cell("length", PAPER_MODEL, length, *PAPER)


class Bench:
    """Runs cells and keeps what came of them."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, budget_s: float, *, quick: bool = False
    ) -> None:
        self.device, self.dtype, self.quick = device, dtype, quick
        self.deadline = time.monotonic() + budget_s
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.best_dense = ""
        self.best_sparse: list[str] = []
        self.compiled: set[tuple[str, str, bool]] = set()
        self.red = 0

    def tensors(self, shape: Shape, length: int) -> QKV:
        torch.manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(length, heads, shape.head_dim, dtype=self.dtype, device=self.device)

        return draw(shape.num_q_heads), draw(shape.num_kv_heads), draw(shape.num_kv_heads)

    def run(self, cell: Cell) -> None:
        if time.monotonic() > self.deadline:
            self.left_out[str(tuple(cell))] = "the time was up"
            return
        shape = MODELS[cell.model]
        on_cpu = self.device.type == "cpu"
        per_frame = CPU_TOKENS_PER_FRAME if on_cpu else TOKENS_PER_FRAME
        prompt = Prompt.of_video(cell.length, cell.sink_frames, cell.block_frames, per_frame)
        try:
            qkv = self.tensors(shape, cell.length)
        except torch.OutOfMemoryError as error:
            self.left_out[str(tuple(cell))] = str(error)[:300]
            return
        dense, sparse = self.peers(cell)
        times = self.measure(cell, shape, prompt.full(), dense, qkv)
        if not times:
            self.left_out[str(tuple(cell))] = "no full attention to compare with"
            return
        fastest = min(times, key=lambda name: times[name])
        sparse_times = self.measure(cell, shape, prompt, sparse, qkv, dense_s=times[fastest])
        if not self.best_dense:
            self.best_dense = fastest
            self.best_sparse = sorted(sparse_times, key=lambda name: sparse_times[name])[:KEPT]

    def peers(self, cell: Cell) -> tuple[dict[str, Attention], dict[str, Attention]]:
        """Full attention and sparse: everybody in the sweep of lengths as far as 200k, then those
        that were fastest in the first cell."""
        dense, sparse = dense_peers(self.device), sparse_peers(self.device)
        if cell.sweep != "length" or cell.length not in FLEX_AT:
            sparse.pop("flex attention", None)
        if self.best_dense and (cell.length >= ONE_DENSE_FROM or cell.sweep != "length"):
            dense = {self.best_dense: dense[self.best_dense]}
            sparse = {name: sparse[name] for name in self.best_sparse if name in sparse} or sparse
        return dense, sparse

    def measure(
        self,
        cell: Cell,
        shape: Shape,
        prompt: Prompt,
        peers: dict[str, Attention],
        qkv: QKV,
        dense_s: float | None = None,
    ) -> dict[str, float]:
        """Seconds of each peer with a green gate; a row of the table for each."""
        times: dict[str, float] = {}
        for name, peer in peers.items():
            if reason := missing(name, *qkv):
                self.left_out[name] = reason
                continue
            if time.monotonic() > self.deadline and times:
                self.left_out[f"{name} {tuple(cell)}"] = "the time was up"
                continue
            try:
                with release_of(name):
                    ratio, taken = self.gate_and_time(cell, name, partial(peer, *qkv, prompt), qkv)
            # A peer that fails must not cost the figures of the others.
            except (RuntimeError, ValueError, ImportError, AssertionError, TypeError) as error:
                self.left_out[f"{name} {tuple(cell)}"] = f"{type(error).__name__}: {error}"[:300]
                continue
            kind = "dense" if dense_s is None else "pevlm"
            row: dict[str, Any] = {**cell._asdict(), "kind": kind, "name": name}
            row |= {"error_of_budget": round(ratio, 3), "green": ratio <= 1}
            self.rows.append(row)
            if ratio > 1:
                self.red += 1
                print(f"RED   {name} {tuple(cell)}: error {ratio:.2f} of what it may be")
                continue
            times[name] = taken
            row |= {"ms": taken * 1e3, "tflops": flops(prompt, shape) / taken / 1e12}
            row["ns_per_token"] = taken / prompt.length * 1e9
            row["ns_per_pair"] = taken / prompt.pairs * 1e9
            row["visible_fraction"] = prompt.visible_fraction
            if dense_s is not None:
                row["speedup"] = dense_s / taken
                row["of_the_ratio"] = dense_s / taken * prompt.visible_fraction
            print(line(row), flush=True)
        return times

    def gate_and_time(
        self, cell: Cell, name: str, call: partial[torch.Tensor], qkv: QKV
    ) -> tuple[float, float]:
        """The error as a share of what it may be, and seconds of a call. Where a call takes long
        and has nothing to compile any more, the gate's own call is the one that is timed."""
        limit_s = 0.25 if cell.sweep != "length" else 0.4
        if self.device.type == "cpu" and not self.quick:
            limit_s = 3.0
        prompt = call.args[-1]
        out: list[torch.Tensor] = []
        first = one_call(lambda: out.append(call()), self.device)
        ratio = worst_ratio(out.pop(), *qkv, prompt)
        key = (name, cell.model, bool(prompt.blocks))
        if key in self.compiled and first > 2 * limit_s:
            return ratio, first
        self.compiled.add(key)
        return ratio, seconds(call, self.device, limit_s=limit_s)


HEADER = (
    f"{'model':20}{'tokens':>9}{'sink':>5}{'block':>6}  {'kernel':20}"
    f"{'ms':>10}{'TFLOP/s':>9}{'speed-up':>9}{'of the ratio':>13}"
)


def line(row: dict[str, Any]) -> str:
    sizes = f"{row['sink_frames']:>5}{row['block_frames']:>6}"
    if row["kind"] == "dense":
        sizes = "    -     -"
    text = f"{row['model']:20}{row['length']:>9}{sizes}"
    text += f"  {row['name']:20}{row['ms']:>10.2f}{row['tflops']:>9.2f}"
    if "speedup" in row:
        text += f"{row['speedup']:>8.2f}x{row['of_the_ratio']:>12.0%}"
    return text


def drift(rows: list[dict[str, Any]], linear_from: int) -> dict[str, dict[str, float]]:
    """For each kernel, how far its time per token is from that of the shortest long prompt, and so
    for the pairs a token and the time per pair."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        long = row["sweep"] == "length" and row["length"] >= linear_from
        if long and row["kind"] == "pevlm" and row["green"]:
            found.setdefault(row["name"], []).append(row)
    return {name: drift_of(own) for name, own in found.items() if len(own) > 1}


def tune(bench: Bench) -> dict[str, float]:
    """Let the own kernel choose its tiles, once, at the paper's point."""
    from pevlm_kernels import triton_prefill

    shape, peer = MODELS[PAPER_MODEL], sparse_peers(bench.device)["pevlm triton"]
    qkv = bench.tensors(shape, AT)
    if missing("own triton", *qkv):
        return {}
    prompt = Prompt.of_video(AT, *PAPER, TOKENS_PER_FRAME)
    found = triton_prefill.tune(
        shape.head_dim,
        bench.dtype,
        qkv[0].device,
        lambda: seconds(partial(peer, *qkv, prompt), bench.device),
    )
    return {str(tuple(sizes)): taken * 1e3 for sizes, taken in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="PEVLM's attention beside full attention")
    parser.add_argument("--quick", action="store_true", help="fewer cells")
    parser.add_argument("--budget", type=float, default=400, help="seconds (default: 400)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        one_thread()
    about = card(device)
    print(summary(about))
    bench = Bench(device, dtype, options.budget, quick=options.quick)
    result: dict[str, Any] = {"benchmark": "attention", "card": about, "dtype": str(dtype)}
    result |= {"tuned_ms": tune(bench) if device.type == "cuda" else {}, "complete": False}
    print("\n" + HEADER)
    for cell in cells(device, options.quick):
        bench.run(cell)
        result |= {"left_out": bench.left_out, "rows": bench.rows}
        write_json(options.output, result)
    if device.type == "cpu":
        result["linear"] = measure_linear(quick=options.quick)
        result["drift"] = {"pevlm sdpa": drift_of(result["linear"])}
    else:
        result["drift"] = drift(bench.rows, LINEAR_FROM)
    for name, reason in bench.left_out.items():
        print(f"left out: {name}: {reason}")
    for name, shares in result["drift"].items():
        parts = ", ".join(f"{what} {share:.1%}" for what, share in shares.items())
        print(f"drift of {name}: {parts}")
    result["complete"] = True
    write_json(options.output, result)
    print(json.dumps(result))
    if bench.red or not any(row["kind"] == "pevlm" and row["green"] for row in bench.rows):
        sys.exit("bench_attention: a gate is red, or nothing of PEVLM ran")


if __name__ == "__main__":
    main()
