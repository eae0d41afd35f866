"""The benchmarks' server: its models, its stopwatch, its gate and its arithmetic, without starting
one; and the command that runs everything, without the time to."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import threading
from importlib.metadata import Distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_llm_prefill  # noqa: E402
import bench_serving  # noqa: E402
import prefill_sglang  # noqa: E402
import serving  # noqa: E402
import stopwatch  # noqa: E402
from workload import MODELS  # noqa: E402

from support.exchange import Answer  # noqa: E402
from support.tiny import make_tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=1, vision_depth=1)


@pytest.mark.parametrize("name", serving.REAL)
def test_models_have_the_real_dimensions(name: str, small: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    directory = serving.write_real(name, tmp_path, small)
    assert not list(directory.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(directory)
    text, shape = config.text_config, MODELS[name]
    assert text.hidden_size == shape.hidden_size == config.vision_config.out_hidden_size
    assert text.num_hidden_layers == shape.num_layers
    assert text.intermediate_size == shape.intermediate_size
    heads = text.num_attention_heads, text.num_key_value_heads
    assert heads == (shape.num_q_heads, shape.num_kv_heads)
    assert text.hidden_size // text.num_attention_heads == shape.head_dim
    assert sum(text.rope_parameters["mrope_section"]) == shape.head_dim // 2
    assert config.vision_config.depth == 32
    assert len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]) < 1000


# --- The stopwatch -------------------------------------------------------------------------------


def test_stopwatch_is_a_plugin_that_sglang_finds(tmp_path: Path) -> None:
    folder = stopwatch.install(tmp_path)
    (found,) = Distribution.discover(path=[str(folder)])
    (point,) = found.entry_points.select(group="sglang.srt.plugins")
    assert point.value == "pevlm_stopwatch:register"
    assert (folder / "pevlm_stopwatch.py").read_text() == Path(stopwatch.__file__).read_text()


def test_what_the_stopwatch_hooks_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins import hook_registry

    targets: dict[str, Any] = {}
    register = staticmethod(lambda target, hook, kind: targets.update({target: hook}))
    monkeypatch.setattr(hook_registry.HookRegistry, "register", register)
    stopwatch.register()
    for target, hook in targets.items():
        owner, name = target.rsplit(".", 1)
        original = getattr(pkgutil.resolve_name(owner), name)
        assert inspect.iscoroutinefunction(original) == inspect.iscoroutinefunction(hook), target
    positions = {"ModelRunner.forward": 1, ".AttentionBackend.forward": 5}
    for end, position in positions.items():
        (target,) = [target for target in targets if target.endswith(end)]
        owner, name = target.rsplit(".", 1)
        parameters = list(inspect.signature(getattr(pkgutil.resolve_name(owner), name)).parameters)
        assert parameters[position] == "forward_batch"


@pytest.mark.parametrize(
    ("mode", "capturing", "timed"),
    [("EXTEND", False, True), ("EXTEND", True, False), ("DECODE", False, False)],
)
def test_a_graph_that_is_captured_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, mode: str, capturing: bool, timed: bool
) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    def timer(running: Any, device: Any) -> Any:
        timers.append(device)
        return contextlib.nullcontext()

    timers: list[Any] = []
    monkeypatch.setattr(stopwatch, "_timed", timer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    batch = SimpleNamespace(forward_mode=ForwardMode[mode])
    q = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    found = stopwatch._timed_attention(lambda *args, **_: args, 0, q, 1, 2, 3, batch, True)
    assert found == (0, q, 1, 2, 3, batch, True)
    assert bool(timers) == timed


def test_functions_that_call_each_other_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stopwatch._Clock()
    now = iter([10.0, 13.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    with clock.outermost("decode"), clock.outermost("decode"):
        pass
    assert clock.seconds == {"decode": 3.0, "prepare": 0.0}


def test_threads_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stopwatch._Clock()

    def decode() -> None:
        with clock.outermost("decode"):
            entered.wait(5)  # both are inside at the same time

    entered = threading.Barrier(2)
    threads = [threading.Thread(target=decode) for _ in range(2)]
    monkeypatch.setattr(stopwatch.time, "perf_counter", TwoSeconds())
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.seconds["decode"] == pytest.approx(4.0)


class TwoSeconds:
    """A clock on which every thread's block takes two seconds."""

    def __init__(self) -> None:
        self.started: set[int] = set()

    def __call__(self) -> float:
        me = threading.get_ident()
        if me in self.started:
            return 102.0
        self.started.add(me)
        return 100.0


# --- The client's arithmetic ---------------------------------------------------------------------


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> serving.Client:
    """Each request takes 10 s to its first token, and adds these seconds to the server's totals."""
    spent = {"decode": 1.0, "prepare": 3.0, "vision": 2.0, "forward": 6.0, "attention": 3.5}
    totals = dict.fromkeys(spent, 0.0) | {"pairs_saved": 0}

    def video(path: Path, *, pevlm: bool, max_frames: int | None = None) -> tuple[float, int]:
        for name, seconds in spent.items():
            totals[name] += seconds
        totals["pairs_saved"] += 4950 * pevlm
        return 10.0, 99

    client = serving.Client("http://nowhere")
    monkeypatch.setattr(client, "flush", lambda: None)
    monkeypatch.setattr(client, "totals", lambda: dict(totals))
    monkeypatch.setattr(client, "video", video)
    return client


def test_parts_make_the_whole(client: serving.Client) -> None:
    for _ in range(2):
        found = client.split(Path("clip"), pevlm=True)
        parts = {part: found[part] for part in serving.PARTS}
        assert parts == {
            "decode": 1,
            "preprocess": 2,
            "vision": 2,
            "attention": 3.5,
            "other_prefill": 0.5,
            "rest": 1,
        }
        assert sum(parts.values()) == found["first_token"]


def test_the_tables(client: serving.Client) -> None:
    single = bench_serving.alone(client, Path("clip"), 2)
    many = bench_serving.together(client, [Path("a"), Path("b")], 1)
    assert single["pevlm"]["first_token_s"] == 10
    assert many["full"]["first_token_median_s"] == 10
    lines = bench_serving.report(single, many).splitlines()
    assert lines[0] == "prompt: 99 tokens"
    assert lines[2].split() == [
        *("full", "10.00", "s", "1.00", "2.00", "2.00", "4.00", "3.50", "1.00")
    ]


def test_sglangs_rows(client: serving.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_sglang, "Client", lambda url: client)
    monkeypatch.setattr(prefill_sglang, "_video", lambda frames, size: Path("clip"))
    (row,) = prefill_sglang.rows(serving.Running("", ""), (8,), 1)
    assert row["visible_fraction"] == 0  # of 99 * 100 / 2 pairs, all are saved
    assert row["full"] == {"attention_s": 3.5, "other_s": 0.5, "total_s": 4.0}
    assert row["pevlm_sparse_calls"] == 1


def test_full_attention_that_saves_pairs_fails(
    client: serving.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = client.video
    monkeypatch.setattr(client, "video", lambda path, **options: always(path, pevlm=True))
    with pytest.raises(SystemExit, match="full attention: 4950 attention pairs saved"):
        client.split(Path("clip"), pevlm=False)


def test_crossover_ignores_prompts_that_are_full_attention() -> None:
    def row(length: int, visible: float, full: float, pevlm: float) -> dict[str, Any]:
        totals = {"full": {"total_s": full}, "pevlm": {"total_s": pevlm}}
        return {"length": length, "visible_fraction": visible, **totals}

    rows = [row(1, 1.0, 9, 8), row(2, 0.9, 2, 3), row(3, 0.5, 3, 3), row(4, 0.3, 9, 4)]
    assert bench_llm_prefill.crossover(rows) == 3
    assert bench_llm_prefill.crossover(rows[:2]) is None
    assert bench_llm_prefill.crossover(rows[:1]) is None


# --- The gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "full", "others", "green"),
    [
        (1e-5, 1e-5, 1.0, True),
        (0.1, 0.06, 1.0, True),  # bf16: within twice of what full attention costs
        (0.1, 0.04, 1.0, False),  # further than that
        (0.1, 0.06, 0.15, False),  # as near to the other mask's answer
        (float("nan"), 0.1, 1.0, False),
    ],
)
def test_gate(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    own: float,
    full: float,
    others: float,
    green: bool,
) -> None:
    class Asked:
        def __init__(self, *args: object) -> None: ...

        def ask(self, *questions: Any) -> list[str]:
            return ["sparse", "full"]

        def difference(self, question: Any, answer: Answer | str, setting: Any) -> float:
            if setting is not None:
                return own
            return full if answer == "full" else others

    monkeypatch.setattr(serving, "Exchange", Asked)
    monkeypatch.setattr(serving, "QwenVLOracle", lambda model: None)
    monkeypatch.setattr(serving, "write_video", lambda path, **options: path)
    if green:
        assert "from the reference" in serving._gate(None, tmp_path, tmp_path)
    else:
        with pytest.raises(SystemExit, match="gate is red"):
            serving._gate(None, tmp_path, tmp_path)


def test_a_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_URL", "http://there")
    monkeypatch.setenv("SERVER_GATE", "green")
    with serving.running("Qwen2.5-VL-7B") as found:
        assert found == ("http://there", "green")


def test_real_dimensions_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(SystemExit, match="expected tiny on a machine without a GPU"),
        serving.running("Qwen2.5-VL-7B"),
    ):
        pass


def test_graphs_of_a_server_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_URL", "http://there")
    monkeypatch.setenv("SERVER_GATE", "green")
    with (
        pytest.raises(SystemExit, match="--cuda-graphs: expected none beside SERVER_URL"),
        serving.running("tiny", graphs="full"),
    ):
        pass


def test_graphs_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(SystemExit, match="--cuda-graphs: expected none on a machine without a GPU"),
        serving.running("tiny", graphs="off"),
    ):
        pass


@pytest.mark.parametrize(
    ("graphs", "decode", "prefill"),
    [
        ("sglang", None, None),
        ("off", "disabled", "disabled"),
        ("breakable", None, "breakable"),
        ("full", None, "full"),
    ],
)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_launch_words(on_gpu: bool, graphs: str, decode: str | None, prefill: str | None) -> None:
    """As SGLang reads them: on a GPU, nothing takes its graphs away but ``off``."""
    from sglang.srt.server_args import ServerArgs

    flags = serving.launch_flags(on_gpu=on_gpu, dummy=True, graphs=graphs)
    at = flags.index("--attention-backend")
    assert flags.pop(at + 1) == "pevlm"  # a choice where the plugin is loaded
    flags.pop(at)
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    read = parser.parse_args(["--model-path", "model", *flags])
    found = read.cuda_graph_backend_decode, read.cuda_graph_backend_prefill
    assert found == ((decode, prefill) if on_gpu else (None, None))
    assert not any("disable" in flag and "graph" in flag for flag in flags)
    assert read.device == ("cuda" if on_gpu else None)
    assert read.load_format == "dummy"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", {"decode": "full", "prefill": "disabled"}),
        ("cpu", {"decode": "disabled", "prefill": "disabled"}),
    ],
)
def test_graphs_are_what_the_server_says(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: dict[str, str]
) -> None:
    """None is captured on a CPU, whatever its default says."""
    config = {"decode": {"backend": "full", "bs": [1]}, "prefill": {"backend": "disabled"}}
    client = serving.Client("http://nowhere")
    info = {"device": device, "cuda_graph_config": config}
    monkeypatch.setattr(client, "info", lambda: info)
    assert client.graphs() == expected


# --- Everything in one command -------------------------------------------------------------------


def test_no_step_begins_when_the_time_is_up(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "all.sh"), "--rehearse", str(tmp_path)],
        env={**os.environ, "SECONDS_IN_ALL": "0", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout.count("left out, the time is up") == 6, done.stdout
    assert "== figures: at most 20 s" in done.stdout
