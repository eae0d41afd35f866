"""bench_plan.py at a small size: what it times is what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_plan
import request_costs

from pevlm_kernels.flash_calls import SCRATCH_BYTES
from pevlm_sglang.observe.observer import Observer

CPU = torch.device("cpu")


def test_plans_in_one_chunk_and_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plan, "LENGTH", 3000)
    monkeypatch.setattr(bench_plan, "CHUNK", 700)
    monkeypatch.setattr(bench_plan, "CASES", (bench_plan.Case("small", 64, 2, 2, 4),))
    observer = Observer(log=False, metrics=False)
    whole, cut = bench_plan.plan_rows(CPU, observer)
    # A sink of one step, then two steps a block: 44 of them in 2872 tokens.
    assert whole["blocks"] == cut["blocks"] == 22
    assert (whole["forwards"], cut["forwards"]) == (1, 5)
    sink, question = 64 + 64, 3000
    assert whole["keys"] == sink + 128 + 20 * (sink + 128) + sink + 64 + question
    assert cut["keys"] > whole["keys"]
    assert all(row["plan_ms"] > 0 and row["host_ms"] > 0 for row in (whole, cut))
    assert set(whole["derived_ms"]) == {"triton", "fa3 base", "flash"}
    assert observer.totals.sparse_forwards > 0


def test_a_mixed_batch_copies_the_video_alone() -> None:
    plain, paged = bench_plan.mixed_rows()
    assert plain["gathered_keys"] == plain["keys"] > 6_300_000
    assert paged["gathered_keys"] < 25_000
    assert paged["gathered_keys"] == paged["keys"] - 63 * 100_000
    assert paged["table_bytes"] == 63 * 100_000 * 4
    assert max(row["scratch_bytes"] for row in (plain, paged)) <= SCRATCH_BYTES // 2
    assert plain["unbounded_bytes"] > 12e9


def test_call_overhead_is_microseconds() -> None:
    assert bench_plan.call_overhead(Observer(log=False, metrics=False)) < 1e-4


@pytest.mark.parametrize("name", request_costs.KINDS)
def test_a_request_costs_in_proportion_to_its_steps(name: str) -> None:
    """Ten times the steps, ten times the time: a quadratic part would show."""
    few, many = (request_costs.request_row(name, steps, 8192) for steps in (120, 1200))
    assert few["refused"] is many["refused"] is None
    assert (few["blocks"], many["blocks"]) == ((120, 1200) if name == "images" else (119, 1199))
    assert all(few[f"{part}_us"] > 0 for part in request_costs.TIMES)
    for part in ("spans", "layout", "size"):
        if (name, part) != ("images", "layout"):  # whose blocks all see other text, up to a bound
            assert many[f"{part}_us"] < 30 * few[f"{part}_us"], part


def test_a_request_beyond_the_bound() -> None:
    row = request_costs.request_row("images", 2000, 8192)
    assert "expected at most 1048576 ranges in what all blocks see" in row["refused"]
    assert "refused" in request_costs.request_line(row)
