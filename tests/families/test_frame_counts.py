"""What ``pevlm show`` predicts for InternVL3.5 and LongVILA, against the token streams of their
processors as the golden files have them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pevlm_sglang.families.registry import of_checkpoint, published
from pevlm_sglang.families.sizes import Geometry
from support.families import internvl_model, longvila

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS: dict[str, Callable[[Path], Path]] = {
    "internvl": internvl_model.make_tiny_model,
    "longvila": longvila.make_tiny_model,
}


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def geometry(family: str, tmp_path: Path) -> Geometry:
    return of_checkpoint(MODELS[family](tmp_path))


def golden_steps(family: str) -> list[tuple[int, str]]:
    """Tokens and text of each step."""
    line = re.compile(r"\[(\d+), (\d+)\) video \d+ step \d+  (.*)")
    found = (line.match(row) for row in (GOLDEN / f"{family}.txt").read_text().splitlines())
    return [(int(m[2]) - int(m[1]), m[3]) for m in found if m]


def test_steps_are_those_of_the_processor(family: str, geometry: Geometry) -> None:
    """But for a label whose first token is the text's before it."""
    settings = geometry.settings({"num_frames": 2})
    first, second = geometry.video(30, 10.0, (64, 48), settings).steps
    whole = [tokens for tokens, text in golden_steps(family) if not text.startswith('"1: ')]
    assert whole
    assert set(whole) <= {first, second}


@pytest.mark.parametrize(
    ("name", "frames", "tokens"),
    [("internvl3_5", 32, 32 * 263 + 23), ("longvila", 256, 256 * 257)],
)
def test_published_checkpoints(name: str, frames: int, tokens: int) -> None:
    """16 × 16 tokens a frame with its label, 23 of them of two digits; 16 × 16 and a newline."""
    model = published()[name]
    video = model.video(9_000, 30.0, (1280, 720), model.settings({}))
    assert (video.frames, sum(video.steps)) == (frames, tokens)


def test_rate_of_longvila() -> None:
    model = published()["longvila"]
    settings = model.settings({"fps": 2})
    assert model.video(300, 30.0, (64, 48), settings).frames == 20
    assert model.video(300_000, 30.0, (64, 48), settings).frames == 256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": 1}, "video setting fps: expected one of num_frames, max_frames"),
        ({"num_frames": 0}, "num_frames: expected a whole number of more than 0, got 0"),
        ({"num_frames": 800}, r"num_frames: expected at most max_frames \(768\), got 800"),
    ],
)
def test_bad_settings_of_internvl(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        published()["internvl3_5"].settings(values)


def test_another_number_of_frames_says_how(geometry: Geometry) -> None:
    with pytest.raises(ValueError, match=r"7 sampled frames: 5 are .* set num_frames to 7"):
        geometry.sample(7, geometry.settings({"num_frames": 5}))


def test_unknown_projector_is_refused(tmp_path: Path) -> None:
    model = longvila.make_tiny_model(tmp_path)
    (model / "mm_projector" / "config.json").write_text('{"mm_projector_type": "linear"}')
    with pytest.raises(ValueError, match=r"mm_projector_type: expected one of .* got linear"):
        of_checkpoint(model)
