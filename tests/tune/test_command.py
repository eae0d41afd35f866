"""``pevlm tune`` end to end against a fake server: what it measures, writes and resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pevlm_sglang.settings.config import PevlmConfig, resolve
from pevlm_sglang.tools import picture
from pevlm_sglang.tune.measurements import open_measurements
from support.fake_server import FakeServer
from tune.conftest import COLOURS, SIZES

SETTINGS = [None, (2, 4), (2, 8), (4, 4), (4, 8)]


def measurements(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "out" / "measurements.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    return found


# --- A whole run -----------------------------------------------------------------------------


def test_labelled(
    server: FakeServer,
    questions: Path,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.wrong = {(2, 4): {"Say red"}, (2, 8): {"Say red", "Say blue"}}
    server.delays |= {(4, 4): 0.02}
    assert run(questions) == 0
    out = capsys.readouterr().out
    found = results(tmp_path)
    accuracies = [round(row["accuracy"]["value"], 3) for row in found["results"]]
    assert accuracies == [1.0, 0.667, 0.333, 1.0, 1.0]
    assert found["results"][1]["agreement"]["value"] == pytest.approx(2 / 3)
    # wrong: |-2.0 + 0.1|, else |-0.3 + 0.1|
    assert found["results"][1]["logprob_difference"] == pytest.approx((1.9 + 2 * 0.2) / 3)
    assert found["results"][0]["ttft_median_s"] >= 0.05
    assert (found["questions"], found["videos"]) == (6, 2)
    assert found["recommended"] == {"sink_frames": 4, "block_frames": 8}, "the fastest of the best"
    assert "recommended within 10 s at the 0.9 quantile: a sink of 4 and blocks of 8 frames;" in out
    assert "warning: few videos (2)" in out
    assert "6 questions cannot tell 4 / 8 from 4 / 4, full attention" in out
    preset = tmp_path / "out" / "preset.yaml"
    config = resolve(preset, {})
    assert (config.enabled, config.sink_frames, config.block_frames) == (True, 4, 8)
    assert f"pevlm tune {questions}" in preset.read_text()
    assert "--model-path tiny --attention-backend pevlm --pevlm-config" in preset.read_text()
    assert """--mm-process-config '{"video": {"fps": 2}}'""" in preset.read_text()
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_requests(server: FakeServer, questions: Path, run: Callable[..., int]) -> None:
    """Every request finds empty caches; each question goes through all settings in turn."""
    assert run(questions) == 0
    assert server.order == ["/flush_cache", "/v1/chat/completions"] * len(server.asked)
    once = Counter(json.dumps(body) for body in server.asked)
    warm_ups = [body for body, number in once.items() if number == 2]
    assert len(once) == 30
    assert len(server.asked) == 30 + len(SETTINGS)
    assert len(warm_ups) == len(SETTINGS), "one a setting"
    measured = server.asked[2 * len(SETTINGS) :]
    for start in range(0, len(measured), len(SETTINGS)):
        turn = measured[start : start + len(SETTINGS)]
        assert len({json.dumps(body["messages"]) for body in turn}) == 1
        assert {json.dumps(body["custom_params"]) for body in turn} == {
            json.dumps(body["custom_params"]) for body in server.asked[: 2 * len(SETTINGS)]
        }
    assert {_first(measured, start) for start in range(0, 25, 5)} == set(SETTINGS)


def _first(asked: list[dict[str, Any]], start: int) -> tuple[int, int] | None:
    options = asked[start]["custom_params"]["pevlm"]
    return (options["sink_frames"], options["block_frames"]) if options["enabled"] else None


def test_unlabelled(
    server: FakeServer, write: Callable[..., Path], run: Callable[..., int], tmp_path: Path
) -> None:
    server.wrong = {(2, 4): {"Say red"}}
    asked = [{"video": "a.mp4", "question": f"Say {colour}"} for colour in COLOURS]
    assert run(write(*asked)) == 0
    found = results(tmp_path)
    assert [row["accuracy"] for row in found["results"]] == [None] * 5
    shares = [round(row["agreement"]["value"], 3) for row in found["results"]]
    assert shares == [1.0, 0.667, 1.0, 1.0, 1.0]


def test_full_attention_as_a_preset(
    server: FakeServer, questions: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    """Beside the server's own options that change answers."""
    server.wrong = {setting: {"Say red"} for setting in SETTINGS if setting}
    assert server.pevlm is not None
    server.pevlm["image_runs"] = True
    assert run(questions) == 0
    preset = resolve(tmp_path / "out" / "preset.yaml", {})
    assert preset == PevlmConfig(enabled=False, image_runs=True)


def test_no_setting_within_the_limit(
    questions: Path,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(questions) == 0
    assert run(questions, latency="0.00001") == 3
    assert "no setting is within 1e-05 s at the 0.9 quantile; the nearest is" in (
        capsys.readouterr().out
    )
    assert results(tmp_path)["recommended"] is None
    assert not (tmp_path / "out" / "preset.yaml").exists(), "that of the other limit is gone"


# --- Going on --------------------------------------------------------------------------------


def test_finished_measurements_are_not_measured_again(
    server: FakeServer, questions: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    assert run(questions) == 0
    before = len(server.asked)
    assert run(questions, "--quantile", "0.5") == 0
    assert len(server.asked) == before
    more = ["--sink-frames", "2", "4", "6", "--block-frames", "4", "8"]
    assert run(questions, sizes=more) == 0
    assert set(server.settings()[before:]) == {(6, 4), (6, 8)}
    with questions.open("a") as file:
        file.write('{"video": "a.mp4", "question": "Say pink", "answer": "pink"}\n')
    before = len(server.asked)
    assert run(questions) == 0
    texts = {body["messages"][0]["content"][1]["text"] for body in server.asked[before:]}
    assert texts == {"Say pink"}
    assert results(tmp_path)["questions"] == 7


def test_torn_line_is_measured_again(
    server: FakeServer, questions: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    assert run(questions) == 0
    file = tmp_path / "out" / "measurements.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    before = len(server.asked)
    assert run(questions) == 0
    assert len(server.asked) == before + 2, "that one, and its setting's warm-up"
    assert len(measurements(tmp_path)) == 30


def test_interrupted(
    server: FakeServer, questions: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    """A real SIGINT, in a process of its own."""
    server.delays |= dict.fromkeys(SETTINGS, 0.1)
    code = (
        "import signal, sys; from pevlm_sglang.tools.cli import main;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a background job ignores it
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["tune", str(questions), "--latency", "10", "--url", server.url, *SIZES]
    command += ["--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True
    )
    file = tmp_path / "out" / "measurements.jsonl"
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    finished = measurements(tmp_path)
    assert 7 <= len(finished) < 30
    assert f"interrupted; {len(finished)} of 30 measurements are in" in stderr
    assert f"to go on: pevlm tune {questions} --latency 10" in stderr
    assert "Traceback" not in stderr

    server.delays.clear()
    assert run(questions) == 0
    keys = [(json.dumps(one["setting"]), one["question"]) for one in measurements(tmp_path)]
    assert len(keys) == len(set(keys)) == 30
    assert measurements(tmp_path)[: len(finished)] == finished


def other_model(server: FakeServer) -> None:
    server.info["model_path"] = "large"


def other_release(server: FakeServer) -> None:
    server.info["version"] = "0.5.24"


def other_sampling(server: FakeServer) -> None:
    server.info["mm_process_config"] = {"video": {"fps": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_model, 'measured with model_path = "tiny", this run has "large"'),
        (other_release, 'measured with sglang_version = "0.5.23", this run has "0.5.24"'),
        (other_sampling, '"fps": 2}}, this run has {"video": {"fps": 1}}; use another --output'),
    ],
)
def test_measurements_of_another_server_are_not_mixed_in(
    server: FakeServer,
    questions: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[FakeServer], None],
    message: str,
) -> None:
    assert run(questions) == 0
    before = len(server.asked)
    change(server)
    assert run(questions) == 2
    assert message in capsys.readouterr().err
    assert len(server.asked) == before


def test_one_run_at_a_time(
    questions: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_measurements(tmp_path / "out", {}):
        assert run(questions) == 2
    assert "another run is writing there" in capsys.readouterr().err


def test_broken_measurements(
    questions: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(questions) == 0
    file = tmp_path / "out" / "measurements.jsonl"
    file.write_bytes(b'{"setting": 3}\n' + file.read_bytes())
    assert run(questions) == 2
    assert "measurements.jsonl, line 1: expected a measurement" in capsys.readouterr().err
    assert len(file.read_bytes().splitlines()) == 31, "nothing is thrown away"


# --- Without matplotlib ----------------------------------------------------------------------


def test_without_matplotlib(
    server: FakeServer,
    questions: Path,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(picture, "available", lambda: False)
    assert run(questions, "--png") == 2
    assert "pip install 'pevlm-sglang[png]'" in capsys.readouterr().err
    assert not server.asked, "before anything is measured"
    assert run(questions) == 0
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "out" / "plot.png").exists()
