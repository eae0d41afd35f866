"""The benchmarks, as far as a machine without a GPU can run them: their prompts against the mask of
the specification, gates that can turn red, and every script once at small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pevlm_kernels import flash
from support.spec_mask import spec_mask

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_attention  # noqa: E402
from gate import worst_ratio  # noqa: E402
from peers import dense_peers, release_of, sparse_peers  # noqa: E402
from workload import MODELS, QUESTION_TOKENS, SYSTEM_TOKENS, Prompt, flops  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(("sink", "block"), [(2, 3), (0, 1), (1, 50), (90, 2)])
def test_prompt_is_the_specification(sink: int, block: int) -> None:
    length, per_frame = 300, 7
    prompt = Prompt.of_video(length, sink, block, per_frame)
    video_end = length - QUESTION_TOKENS
    starts = range(SYSTEM_TOKENS, video_end, per_frame)
    steps = [(start, min(start + per_frame, video_end)) for start in starts]
    mask = torch.from_numpy(spec_mask(length, [steps], sink_steps=sink, block_steps=block))
    found = torch.zeros(length, length, dtype=torch.bool)
    for row in range(length):
        for start, end in prompt.keys_of(row):
            found[row, start:end] = True
    assert torch.equal(found, mask)
    assert prompt.pairs == int(mask.sum())
    assert prompt.full().visible_fraction == 1


def test_the_papers_example() -> None:
    prompt = Prompt.of_video(100_000, 16, 16, 256)
    assert 1 / prompt.visible_fraction == pytest.approx(8.2, abs=0.3)
    shape = MODELS["Qwen2.5-VL-7B"]
    assert flops(prompt.full(), shape) == pytest.approx(2 * 1e10 * 28 * 128, rel=1e-4)


def small_prompt() -> tuple[Prompt, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((700, 4, 64), (700, 2, 64), (700, 2, 64))
    qkv = [torch.randn(size, generator=generator) for size in sizes]
    return Prompt.of_video(700, 2, 3, 16), qkv


def test_gate_is_green_for_every_peer_on_the_cpu() -> None:
    prompt, qkv = small_prompt()
    for peer in sparse_peers(CPU).values():
        assert worst_ratio(peer(*qkv, prompt), *qkv, prompt) <= 1
    full = prompt.full()
    for peer in dense_peers(CPU).values():
        assert worst_ratio(peer(*qkv, full), *qkv, full) <= 1


def test_gate_turns_red() -> None:
    prompt, qkv = small_prompt()
    right = sparse_peers(CPU)["pevlm sdpa"](*qkv, prompt)
    start, end = prompt.blocks[0]
    shifted = ((start, end + 1), (end + 1, prompt.blocks[1][1]), *prompt.blocks[2:])
    wrong = Prompt(prompt.length, prompt.sink_end, shifted)
    assert worst_ratio(sparse_peers(CPU)["pevlm sdpa"](*qkv, wrong), *qkv, prompt) > 1
    assert worst_ratio(right, *qkv, prompt.full()) > 1
    unwritten = right.clone()
    unwritten[-1] = torch.nan
    assert worst_ratio(unwritten, *qkv, prompt) > 1


def test_a_red_peer_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_attention, "sparse_peers", lambda device: {"wrong": lambda q, k, v, prompt: q}
    )
    bench = bench_attention.Bench(CPU, torch.float32, 60)
    bench.run(bench_attention.Cell("length", "tiny", 1024, 16, 16))
    (row,) = [row for row in bench.rows if row["name"] == "wrong"]
    assert not row["green"]
    assert "ms" not in row
    assert bench.red == 1


def test_drift() -> None:
    of_all = {"sweep": "length", "kind": "pevlm", "green": True, "name": "a"}
    rows = [{**of_all, "length": length} for length in (1, 9, 99)]
    for row, ns, pairs in zip(rows, (50.0, 10.0, 10.4), (1.0, 5.0, 5.1), strict=True):
        row |= {"ns_per_token": ns, "ns_per_pair": ns / pairs}
    assert bench_attention.drift(rows, 9) == {
        "a": {
            "time per token": pytest.approx(0.04),
            "pairs per token": pytest.approx(0.02),
            "time per pair": pytest.approx(10.4 / 5.1 / 2 - 1),
        }
    }
    assert bench_attention.drift(rows, 99) == {}


class FakeGpu:
    """The device of a bench that never computes."""

    type = "cuda"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str, str]]:
    """A GPU bench of four peers with known times; what ran, as (sweep, length, kind, name)."""
    ran: list[tuple[str, str, str, str]] = []
    dense = {"slow": None, "fast": None}
    sparse = dict.fromkeys(("d", "c", "b", "a", "flex attention"))
    monkeypatch.setattr(bench_attention, "dense_peers", lambda device: dict(dense))
    monkeypatch.setattr(bench_attention, "sparse_peers", lambda device: dict(sparse))
    monkeypatch.setattr(bench_attention.Bench, "tensors", lambda *args: None)

    def measure(
        self: object, cell: Any, shape: Any, prompt: Any, peers: Any, qkv: Any, dense_s: Any = None
    ) -> dict[str, float]:
        kind = "dense" if dense_s is None else "pevlm"
        ran.extend((cell.sweep, cell.length, kind, name) for name in peers)
        return {name: ord(name[0]) for name in peers}

    monkeypatch.setattr(bench_attention.Bench, "measure", measure)
    return ran


def test_later_cells_take_the_best_of_the_first(pretended: list) -> None:
    bench = bench_attention.Bench(FakeGpu(), torch.bfloat16, 60)
    for cell in bench_attention.cells(FakeGpu(), quick=False):
        bench.run(cell)

    def names(sweep: str, length: int, kind: str) -> set[str]:
        return {name for *where, name in pretended if where == [sweep, length, kind]}

    at = bench_attention.AT
    assert names("length", at, "dense") == {"slow", "fast"}
    assert names("length", at, "pevlm") == {"a", "b", "c", "d", "flex attention"}
    assert names("length", 50_000, "pevlm") == {"a", "b", "c", "d"}
    assert names("length", 1_048_576, "dense") == {"fast"}
    assert names("length", 1_048_576, "pevlm") == {"a", "b", "c"}
    assert names("paper", at, "dense") == {"fast"}
    assert names("model", at, "pevlm") == {"a", "b", "c"}
    swept = {cell for cell in bench_attention.cells(FakeGpu(), quick=False) if cell[0] == "paper"}
    assert {(cell.sink_frames, cell.block_frames) for cell in swept} == {
        (sink, block) for sink in (0, 1, 2, 4, 8, 16) for block in (2, 4, 8, 12, 16, 24)
    }


def test_no_cell_begins_after_the_deadline() -> None:
    bench = bench_attention.Bench(CPU, torch.float32, -1)
    bench.run(bench_attention.Cell("length", "tiny", 1024, 16, 16))
    assert bench.rows == []
    assert bench.left_out == {"('length', 'tiny', 1024, 16, 16)": "the time was up"}


PEERS = {
    (9, 0): {"flash-attention 3", "flash-attention 4", "flash-attention 2"},
    (10, 0): {"flash-attention 4", "flash-attention 2"},
}


@pytest.mark.parametrize("capability", PEERS)
def test_the_named_peers_are_there(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    dense = set(dense_peers(torch.device("cuda", 0)))
    sparse = set(sparse_peers(torch.device("cuda", 0)))
    versions = PEERS[capability]
    others = {"torch cudnn", "torch flash", "own triton", "sglang triton", "flashinfer"}
    assert dense == versions | others
    own = {f"pevlm flash {version[-1]}" for version in versions} | {"pevlm sdpa", "pevlm triton"}
    assert sparse == own | {"flex attention", "sglang triton", "flashinfer"}


def test_a_release_of_flash_attention_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "is_installed", lambda module: module != "flash_attn.cute")
    with release_of("pevlm flash 2"):
        assert flash.library_for((9, 0)).version == 2
    with release_of("flash-attention 4"):
        assert flash.library_for((9, 0)) is None
    with release_of("pevlm triton"):
        assert flash.library_for((9, 0)).version == 3
    assert flash.library_for((9, 0)).version == 3


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the sizes are a CPU's")
def test_scripts_run(tmp_path: Path) -> None:
    attention, llm = tmp_path / "attention.json", tmp_path / "llm.json"
    found = json.loads(run("bench_attention.py", "--quick", "--output", str(attention)))
    assert found == json.loads(attention.read_text())
    assert found["complete"]
    assert set(found["drift"]["pevlm sdpa"]) == {
        "time per token",
        "pairs per token",
        "time per pair",
    }
    assert {row["kind"] for row in found["rows"]} == {"dense", "pevlm"}
    assert all(row["green"] for row in found["rows"])
    lengths = ("--lengths", "512", "1024", "--repeats", "1")
    found = json.loads(run("bench_llm_prefill.py", *lengths, "--output", str(llm)))
    assert all(row["error_of_budget"] <= 1 for row in found["rows"])
    assert [row["pevlm_sparse_calls"] > 0 for row in found["rows"]] == [False, True]
    figures = json.loads(run("plot.py", str(attention), str(llm), "--to", str(tmp_path)))
    assert all(Path(figure).stat().st_size > 10_000 for figure in figures)
