"""``pevlm show``: its layout is the specification's, its mistakes are one line, its picture."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families.qwen_vl.test_sizes import show
from pevlm_sglang.families.registry import of_checkpoint, published
from pevlm_sglang.settings.config import PevlmConfig, preset_names, resolve
from pevlm_sglang.tools import picture
from pevlm_sglang.tools.cli import main
from support.spec_mask import spec_mask

ROOT = Path(__file__).parents[2]


# --- The layout is the specification's -------------------------------------------------------

SMALL = "--frames 24 --size 448x224 --sink-frames 4 --block-frames 4 --prompt-tokens 120 "
SMALL += "--question-tokens 194"

GOLDEN = """\
model    published qwen2_5_vl
video    24 sampled frames of 448x224, resized to 448x224
         12 steps of 2 frames, 128 tokens a step, 64 a frame
prompt   1865 tokens: 129 before the video, 1536 in it, 200 after it
assumed  system prompt 120 tokens, question 194; chat template 9 tokens before and 6 after the video
flags    --attention-backend pevlm --pevlm-sink-frames 4 --pevlm-block-frames 4

part      tokens                 count  sampled frames
sink      [0, 385)                 385  0-3
block 0   [385, 641)               256  4-7
block 1   [641, 897)               256  8-11
block 2   [897, 1153)              256  12-15
block 3   [1153, 1409)             256  16-19
block 4   [1409, 1665)             256  20-23
question  [1665, 1865)             200  -

visible_fraction   0.6234 of the pairs of full attention
attention speed-up 1.60x by arithmetic (1 / visible_fraction), in prefill
"""


def small_mask() -> np.ndarray:
    steps = [(129 + 128 * i, 257 + 128 * i) for i in range(12)]
    return spec_mask(1865, [steps], sink_steps=2, block_steps=2)


def test_golden_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(capsys, SMALL) == GOLDEN


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(show(capsys, f"{SMALL} --json --mm-process-config '{{}}'"))
    mask = small_mask()
    assert content["visible_fraction"] == mask.sum() / np.tri(1865).sum()
    assert content["attention_speedup"] == 1 / content["visible_fraction"]
    assert content["sink"] == [0, 385]
    assert content["blocks"] == [[385 + 256 * i, 641 + 256 * i] for i in range(5)]
    assert content["question"] == [1665, 1865]
    assert content["video"] == [129, 1665]
    assert content["video_grid_thw"] == [12, 16, 32]
    assert (content["frames"], content["steps"], content["prompt_tokens"]) == (24, 12, 1865)
    assert (content["tokens_per_step"], content["tokens_per_frame"]) == ([128, 128], 64)
    assert content["assumed"]["chat_template_tokens"] == [9, 6]
    assert content["config"] == PevlmConfig(sink_frames=4, block_frames=4).describe()


def test_many_blocks_are_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    rows = show(capsys, "--duration 384 --mm-process-config '{}'").split("\n\n")[1].splitlines()
    assert [row.split("  ")[0] for row in rows[1:]] == [
        *("sink", "block 0", "block 1", "block 2"),
        "... 42 more blocks",
        *("block 45", "block 46", "question"),
    ]
    assert rows[-2].split() == ["block", "46", "[103791,", "105999)", "2208", "752-767"]


def test_speed_up_of_a_long_video(capsys: pytest.CaptureFixture[str]) -> None:
    """About L / (2 s + b) for a sink of s, blocks of b and a short question."""
    content = json.loads(show(capsys, "--frames 768 --json"))
    assert content["prompt_tokens"] > 100_000
    estimate = content["prompt_tokens"] / (2 * content["sink"][1] + content["sink"][1])
    assert content["attention_speedup"] == pytest.approx(estimate, rel=0.03)


@pytest.mark.parametrize(
    ("command", "note"),
    [
        ("--frames 32 --sink-frames 16", "full attention: the sink and one block hold all frames"),
        ("--frames 64 --sink-frames 3", "sink_frames 3 is rounded up to 4, whole steps of 2"),
        ("--frames 64 --block-frames 5", "block_frames 5 is rounded up to 6, whole steps of 2"),
        ("--frames 768 --model-family qwen2_vl", "longer than the model's context of 32768"),
    ],
)
def test_notes(capsys: pytest.CaptureFixture[str], command: str, note: str) -> None:
    assert note in show(capsys, command)
    assert "note:" not in show(capsys, "--frames 64")


def test_switched_off_is_full_attention(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "off.yaml").write_text("enabled: false")
    text = show(capsys, f"{tmp_path / 'off.yaml'} --frames 64")
    assert "attention speed-up 1.00x" in text
    assert "note: PEVLM is switched off" in text
    assert "--pevlm-enabled false" in text


def test_flags_give_the_same_prompt_again(capsys: pytest.CaptureFixture[str]) -> None:
    settings = '{"video": {"fps": 1.5, "max_pixels": 400000}}'
    command = (
        f"--duration 90 --sink-frames 2 --json --mm-process-config '{settings}' --max-frames 99"
    )
    content = json.loads(show(capsys, command))
    flags = shlex.split(content["server_flags"])
    assert flags[:6] == [
        *("--attention-backend", "pevlm"),
        *("--pevlm-sink-frames", "2", "--pevlm-block-frames", "16"),
    ]
    again = " ".join(["--duration 90 --json --sink-frames 2", shlex.join(flags[6:])])
    assert json.loads(show(capsys, again)) == content


# --- Models and presets ----------------------------------------------------------------------


def write_model(directory: Path, **changes: Any) -> Path:
    write_config(directory, **changes)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2})
    )
    return directory


def write_config(directory: Path, **changes: Any) -> None:
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "max_position_embeddings": 4096,
        "vision_config": {"temporal_patch_size": 2},
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config))


def test_files_of_a_checkpoint_in_the_order_of_transformers(tmp_path: Path) -> None:
    write_model(tmp_path)
    sizes = {
        "preprocessor_config.json": {"patch_size": 14},
        "video_preprocessor_config.json": {"patch_size": 28},
        "processor_config.json": {"video_processor": {"patch_size": 42}},
    }
    for name, content in sizes.items():
        (tmp_path / name).write_text(json.dumps(content))
    for patch_size in (42, 28, 14):
        write_config(tmp_path, vision_config={"patch_size": patch_size})
        geometry = of_checkpoint(tmp_path)
        assert (geometry.patch_size, geometry.context_length) == (patch_size, 4096)
        next(tmp_path / name for name in reversed(sizes) if (tmp_path / name).exists()).unlink()


@pytest.mark.parametrize("preset", preset_names())
def test_presets(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    """The two commands in a preset's header are right, and name it."""
    text = (ROOT / "configs" / f"{preset}.yaml").read_text()
    lines = [line.removeprefix("#").strip() for line in text.splitlines()]
    header = "\n".join(lines).replace("\\\n", " ")
    launch, shown = (
        shlex.split(next(line for line in header.splitlines() if line.startswith(start)))
        for start in ("python -m sglang.launch_server ", "pevlm show ")
    )
    assert launch[-4:] == ["--attention-backend", "pevlm", "--pevlm-config", preset]
    content = json.loads(show(capsys, shlex.join([*shown[2:], "--json"])))
    assert shown[2] == preset
    assert content["config"] == resolve(preset, {}).describe()
    assert "Precedence: defaults < this file < --pevlm-... flags <" in header


@pytest.mark.parametrize("family", published())
def test_the_family_is_said_not_guessed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str
) -> None:
    (tmp_path / "qwen3_vl.yaml").write_text("sink_frames: 2")  # a name that says nothing
    command = f"{tmp_path / 'qwen3_vl.yaml'} --duration 90 --json"
    assert json.loads(show(capsys, command))["model"] == "published qwen2_5_vl"
    content = json.loads(show(capsys, f"{command} --model-family {family}"))
    assert (content["model"], content["config"]["sink_frames"]) == (f"published {family}", 2)


def test_flags_take_precedence_over_the_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = f"{write_model(tmp_path)} --config low-latency --block-frames 8 --frames 64 --json"
    config = json.loads(show(capsys, command))["config"]
    assert (config["sink_frames"], config["block_frames"]) == (2, 8)


# --- What the user gets wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "--frames --duration"),
        ("--frames 8 --duration 3", "not allowed with"),
        ("--frames 9", "9 sampled frames: SGLang would sample 8"),
        ("--frames 800", "SGLang would sample 768"),
        ("--frames -2", "sampled: expected more than 0"),
        ("--duration inf", "duration: expected more than 0"),
        ("--duration 0.03", "video: expected at least 2 frames"),
        ("--duration 2 --mm-process-config '{\"video\": {\"nframes\": 90}}'", "video's 60 frames"),
        ("--duration 9 --mm-process-config '{\"video\": {\"max_frames\": 1}}'",
         "max_frames: expected at least 2 sampled frames, got 1"),
        ("--duration 2 --video-fps 0", "video_fps: expected more than 0"),
        ("--frames 8 --fps 0", "fps: expected a number of more than 0"),
        ("--frames 8 --size 1280", "expected WIDTHxHEIGHT"),
        ("--frames 8 --size 0x9", "at least 1 pixel"),
        ("--frames 8 --size 9000x40", "ratio of at most 200"),
        ("--frames 8 --size 4000x21 --mm-process-config '{\"video\": {\"max_pixels\": 9000}}'",
         "max_pixels: expected at least min_pixels, 100352 here, got 9000"),
        ("--frames 8 --size 4000x21 --mm-process-config "
         "'{\"video\": {\"min_pixels\": 9000, \"max_pixels\": 9000}}'", "too narrow"),
        ("--frames 8 --mm-process-config 3", "expected '{\"video\": {...}}'"),
        ("--frames 8 --mm-process-config '{\"video\": {\"frames\": 8}}'",
         "video setting frames: expected one of fps, nframes"),
        ("--frames 8 --mm-process-config '{\"video\": {\"fps\": \"2\"}}'", "expected a number"),
        ("--frames 8 --fps 2 --mm-process-config '{\"video\": {\"nframes\": 8}}'", "got both"),
        ("--frames 8 --sink-frames -1", "pevlm: --sink-frames: expected >= 0"),
        ("--frames 8 --block-frames 0", "pevlm: --block-frames: expected >= 1"),
        ("--frames 8 --prompt-tokens -1", "prompt_tokens: expected >= 0"),
        ("--frames 8 --model-family qwen9", "invalid choice: 'qwen9'"),
        ("nowhere --frames 8", "nowhere: expected the directory of a checkpoint or a preset"),
        ("nowhere.yaml --frames 8", "nowhere.yaml: cannot be read"),
        ("{model} --frames 8 --config fast", "expected a preset (accuracy, low-latency) or"),
        ("{model} --frames 8 --model-family qwen2_vl", "leave it out"),
        ("{model} --frames 8 --config {model}/bad.yaml", "unknown option 'sink'"),
        ("{model}/bad.yaml --config x.yaml --frames 8", "expected one preset"),
        ("{model} --frames 8 --png {model}/none/mask.png", "cannot be written"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, message: str
) -> None:
    write_model(tmp_path)
    (tmp_path / "bad.yaml").write_text("sink: 2")
    command = command.replace("{model}", str(tmp_path))
    try:
        code: Any = main(["show", *shlex.split(command)])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("changes", "files", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "Qwen2VLForConditionalGeneration, Qwen2_5"),
        ({"model_type": "qwen9"}, {}, "model_type qwen9: expected one of qwen2_5_vl, qwen2_vl"),
        ({"vision_config": {"temporal_patch_size": 3}}, {}, "temporal_patch_size: config.json"),
        ({}, {"config.json": "{"}, "not valid JSON"),
        ({}, {"config.json": "[]"}, "expected a JSON object, got list"),
        ({}, {"config.json": None}, "config.json: cannot be read"),
        ({}, {"preprocessor_config.json": None}, "found none"),
        ({"vision_config": {"patch_size": 16}}, {}, "patch_size: config.json"),
        ({"vision_config": {"spatial_merge_size": 4}}, {}, "merge_size: config.json"),
    ],
)
def test_a_checkpoint_that_cannot_be_shown(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    changes: dict[str, Any],
    files: dict[str, str | None],
    message: str,
) -> None:
    write_model(tmp_path, **changes)
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
    assert main(["show", str(tmp_path), "--frames", "8"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


# --- The picture -----------------------------------------------------------------------------


def cell(image: np.ndarray, query: int, key: int, length: int) -> str:
    """What the picture says about a pair; the name of no colour is an error."""
    x = picture.LEFT + int((key + 0.5) * picture.SIDE / length)
    y = picture.TOP + int((query + 0.5) * picture.SIDE / length)
    code = "#" + "".join(f"{round(255 * part):02x}" for part in image[y, x, :3])
    return next(name for name, colour in picture.COLOURS.items() if colour == code)


def test_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from matplotlib.image import imread

    show(capsys, f"{SMALL} --png {tmp_path / 'mask.png'}")
    image = imread(tmp_path / "mask.png")
    assert image.shape[:2] == (picture.HEIGHT, picture.WIDTH)
    known = {
        (200, 100): "sink",
        (500, 100): "sink of block",
        (1600, 380): "sink of block",
        (600, 400): "block",
        (1600, 1420): "block",
        (700, 600): "skipped",
        (1600, 1380): "skipped",
        (1700, 100): "question",
        (1800, 1500): "question",
        (500, 700): "future",
        (1400, 1800): "future",
    }
    assert {pair: cell(image, *pair, 1865) for pair in known} == known
    mask, margin = small_mask(), 5  # tokens: lines between the parts, and the diagonal
    compared = 0
    for q, k in itertools.product(range(10, 1855, 30), range(10, 1855, 30)):
        around = mask[q - margin : q + margin + 1, k - margin : k + margin + 1]
        in_legend = q < 450 and k > 850
        if around.min() == around.max() and abs(q - k) > 2 * margin and not in_legend:
            on_line = any(abs(q - end) <= margin for end in range(385, 1670, 256))
            if not on_line:
                visible = cell(image, q, k, 1865) not in ("skipped", "future")
                assert visible == mask[q, k], (q, k)
                compared += 1
    assert compared > 2500


def test_picture_in_the_repository_is_drawn_by_the_tool(tmp_path: Path) -> None:
    from matplotlib.image import imread

    published = ROOT / "docs" / "mask.png"
    assert main(["show", *shlex.split(SMALL), "--png", str(tmp_path / "mask.png")]) == 0
    side = slice(picture.LEFT + 1, picture.LEFT + picture.SIDE - 1)
    down = slice(picture.TOP + 1, picture.TOP + picture.SIDE - 1)
    ours, theirs = (imread(path)[down, side] for path in (tmp_path / "mask.png", published))
    assert (ours != theirs).any(axis=-1).mean() < 0.01  # fonts of the legend may differ
    assert published.stat().st_size < 100_000


def test_colours_differ_in_greyscale() -> None:
    greys = sorted(
        sum(w * int(code[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5)))
        for code in picture.COLOURS.values()
    )
    assert min(np.diff(greys)) > 12


def test_long_and_degenerate_layouts_are_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, command in {
        "long": "--frames 768",
        "no block": "--frames 8",
        "no sink": "--frames 64 --sink-frames 0",
    }.items():
        path = tmp_path / f"{name}.png"
        show(capsys, f"{command} --png {shlex.quote(str(path))}")
        assert path.stat().st_size > 10_000


def test_picture_without_matplotlib_names_the_install_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["show", "--frames", "64", "--png", str(tmp_path / "mask.png")]) == 2
    assert "pip install 'pevlm-sglang[png]'" in capsys.readouterr().err


LEAN = """
import sys
forbidden = ("torch", "sglang", "transformers", "numpy", "matplotlib")
sys.modules.update(dict.fromkeys(forbidden))  # importing one raises ImportError
from pevlm_sglang.tools.cli import main
for family in sys.argv[1:]:
    assert main(["show", "low-latency", "--duration", "90", "--model-family", family]) == 0
    assert main(["show", "--duration", "90", "--json", "--model-family", family]) == 0
"""


def test_needs_neither_torch_nor_sglang() -> None:
    command = [sys.executable, "-c", LEAN, *published()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
