"""A server launched for PEVLM serves PEVLM, or does not start and says why in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.conftest import FEW_TOKENS
from support.server import DEFAULT_ENV, DEFAULT_FLAGS, Server
from support.video import video_data_url

pytestmark = pytest.mark.server


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own; SGLang spawns, so the code must be importable as main."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **DEFAULT_ENV},
        capture_output=True,
        text=True,
        timeout=240,
    )


LAUNCH = "import runpy; runpy.run_module('sglang.launch_server', run_name='__main__')"


def _refusal(model: Path, *flags: str, code: str = LAUNCH) -> str:
    """Launch; the server must end by itself. Returns what it wrote."""
    done = _run(code, "--model-path", str(model), "--port", "1", *DEFAULT_FLAGS, *flags)
    written = done.stdout + done.stderr
    assert done.returncode != 0, written[-3000:]
    assert "fired up" not in written
    return written


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ("--attention-backend", "pevlm", "--pevlm-block-frames", "0"),
            "PEVLM: --pevlm-block-frames: expected >= 1, got 0",
        ),
        (
            ("--attention-backend", "triton", "--pevlm-sink-frames", "2"),
            "PEVLM: --pevlm-sink-frames: expected --attention-backend pevlm beside it, got triton",
        ),
        (
            ("--attention-backend", "pevlm", "--pevlm-media-device", "cuda"),
            "PEVLM: --pevlm-media-device: expected auto or cpu on a server without a GPU, got cuda",
        ),
        (
            ("--decode-attention-backend", "pevlm"),
            "PEVLM: --decode-attention-backend pevlm: PEVLM changes prefill alone",
        ),
        (
            ("--attention-backend", "pevlm", "--mm-process-config", '{"video": {"frames": 8}}'),
            "PEVLM: --mm-process-config: video setting frames: expected one of fps, nframes",
        ),
        (
            ("--attention-backend", "pevlm", "--mm-process-config", '{"video": {"nframes": 1}}'),
            "PEVLM: --mm-process-config: nframes: expected at least 2 sampled frames, got 1; this",
        ),
        (
            ("--attention-backend", "pevlm", "--pevlm-config", "/nowhere.yaml"),
            "PEVLM: pevlm config /nowhere.yaml: cannot be read",
        ),
        (
            ("--attention-backend", "pevlm", "--enable-two-batch-overlap"),
            "PEVLM: --enable-two-batch-overlap: expected False, got True",
        ),
        (
            ("--attention-backend", "pevlm", "--tokenizer-worker-num", "2"),
            "PEVLM: --tokenizer-worker-num: expected 1, got 2",
        ),
    ],
)
def test_refused_by_the_launcher(
    flags: tuple[str, ...], reason: str, model: Callable[[str], Path]
) -> None:
    assert reason in _refusal(model("qwen2_5_vl"), *flags)


def test_model_without_frames_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    """By the launcher, before any weight is loaded."""
    config = json.loads((model("qwen2_5_vl") / "config.json").read_text())["text_config"]
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model("qwen2_5_vl") / name).read_bytes())
    written = _refusal(tmp_path, "--attention-backend", "pevlm", "--load-format", "dummy")
    assert "PEVLM: model architecture Qwen2ForCausalLM: PEVLM does not serve it: " in written
    assert "Load weight" not in written


def test_unknown_video_setting_is_refused(model: Callable[[str], Path]) -> None:
    """SGLang itself would ignore it, for a model that samples a fixed number of frames."""
    flags = ("--attention-backend", "pevlm", "--mm-process-config", '{"video": {"fps": 2}}')
    written = _refusal(model("internvl"), *flags)
    reason = "video setting fps: expected one of num_frames, max_frames"
    assert f"PEVLM: --mm-process-config: {reason}" in written
    assert "Load weight" not in written


def test_kernel_that_cannot_run_here_is_refused(model: Callable[[str], Path]) -> None:
    """By the scheduler, once its backend is there; no request has to find out."""
    flags = ("--attention-backend", "pevlm", "--pevlm-prefill-kernel", "flash")
    written = _refusal(model("qwen2_5_vl"), *flags)
    reason = "expected a kernel that takes this server's tensors, got flash: expected tensors on a"
    assert f"PEVLM: --pevlm-prefill-kernel flash: {reason} CUDA GPU, got cpu" in written


def test_moved_seam_is_refused(model: Callable[[str], Path]) -> None:
    """Where SGLang lacks a function that PEVLM hooks, its name is not on offer."""
    code = (
        "from sglang.srt.managers.scheduler import Scheduler; del Scheduler.get_init_info;" + LAUNCH
    )
    written = _refusal(model("qwen2_5_vl"), "--attention-backend", "pevlm", code=code)
    assert "PEVLM is not available: this SGLang has no" in written
    assert "Scheduler.get_init_info" in written
    assert "invalid choice: 'pevlm'" in written


def test_data_parallelism_without_its_seam_is_refused(model: Callable[[str], Path]) -> None:
    """Before 0.5.23, SGLang's controller cannot report for its schedulers; the rest works."""
    code = (
        "from sglang.srt.managers.data_parallel_controller import DataParallelController;"
        "del DataParallelController.get_init_info;" + LAUNCH
    )
    flags = ("--attention-backend", "pevlm", "--dp-size", "2")
    written = _refusal(model("qwen2_5_vl"), *flags, code=code)
    assert "PEVLM: --dp-size: expected 1, got 2" in written
    assert "PEVLM is not available" not in written


def test_silent_scheduler_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    """A scheduler without the plugin would serve full attention: the launcher stops it."""
    # The launcher has loaded its plugins by then; its schedulers inherit the variable.
    code = (
        "import os; from sglang.srt.plugins import load_plugins; load_plugins();"
        "os.environ['SGLANG_PLUGINS'] = 'none_of_them';" + LAUNCH
    )
    script = tmp_path / "launch.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    written = _refusal(model("qwen2_5_vl"), "--attention-backend", "pevlm", code=code)
    assert "PEVLM: schedulers [0] do not report PEVLM active" in written


def test_serve_with_a_config_file(
    model: Callable[[str], Path], clip: Callable[..., Path], tmp_path: Path
) -> None:
    """``sglang serve``, PEVLM for prefill alone, YAML for SGLang's options and for PEVLM's."""
    preset = tmp_path / "preset.yaml"
    preset.write_text("sink_frames: 2\nblock_frames: 6\n")
    config = tmp_path / "server.yaml"
    config.write_text(
        "prefill-attention-backend: pevlm\npevlm-image-runs: true\n"
        f"pevlm-config: {preset}\npevlm-block-frames: 4\n"
    )
    with Server(
        model("qwen2_5_vl"), "--config", str(config), *FEW_TOKENS, command="serve"
    ) as server:
        info = server.info()["pevlm"]
        video = {"type": "video_url", "video_url": {"url": video_data_url(clip(10))}}
        server.chat([video], max_tokens=2)
        totals = server.info()["internal_states"][0]["pevlm"]
    assert info | {"sink_frames": 2, "block_frames": 4, "image_runs": True} == info
    assert "the vision tower attends within each step" in info["vision_corrections"]
    assert (info["base_backend"], info["prefill_kernel"]) == ("torch_native", "sdpa")
    assert totals["sparse_tokens"] > 0


ENGINE = """
import json, sys
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", dtype="float32", mem_fraction_static=0.3,
        max_total_tokens=8000, attention_backend="pevlm", pevlm_sink_frames=2,
        pevlm_block_frames=2, mm_process_config={"video": {"min_pixels": 3136}},
    )
    prompt = "<|vision_start|><|video_pad|><|vision_end|>What happens?"
    engine.generate(prompt, {"max_new_tokens": 2}, video_data=[sys.argv[2]])
    info = engine.get_server_info()
    print(json.dumps([info["pevlm"], info["internal_states"][0]["pevlm"]]))
    engine.shutdown()
"""


def test_offline_engine(
    model: Callable[[str], Path], clip: Callable[..., Path], tmp_path: Path
) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    done = subprocess.run(
        [sys.executable, str(script), str(model("qwen2_5_vl")), str(clip(10))],
        env={**os.environ, **DEFAULT_ENV},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    info, totals = json.loads(done.stdout.strip().splitlines()[-1])
    assert (info["sink_frames"], info["block_frames"]) == (2, 2)
    assert totals["sparse_tokens"] == 8 * 12


def test_help_lists_the_flags() -> None:
    done = _run(LAUNCH, "--help")
    assert done.returncode == 0
    for flag in ("--pevlm-sink-frames", "--pevlm-block-frames", "--pevlm-config"):
        assert flag in done.stdout
