"""What a request says about its media is read, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from pevlm_sglang.media import told


@pytest.mark.parametrize(
    "fields",
    [
        {"video_config": {"fps": 1}},
        {"mm_processor_kwargs": {"fps": 1}},
        {"use_audio_in_video": True},
        {"min_dynamic_patch": 0},
    ],
)
def test_what_nobody_reads(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ValueError, match=f"{name}: expected none"):
        told.check(GenerateReqInput(text="a", **fields))


def test_what_sglang_says_itself() -> None:
    config = {"_question": "of the chat"}
    told.check(GenerateReqInput(text="a", video_config=config, use_audio_in_video=False))


@pytest.mark.parametrize("name", ["max_dynamic_patch", "video_max_dynamic_patch"])
@pytest.mark.parametrize("tiles", [0, -1, 13, 2.0, True, "1"])
def test_tiles_out_of_bounds(name: str, tiles: Any) -> None:
    request = SimpleNamespace(**{name: tiles})
    with pytest.raises(ValueError, match=f"{name}: expected 1 to 12 tiles, .*got {tiles!r}"):
        told.most_tiles(request, "video", 1, 12)
    with pytest.raises(ValueError, match=f"{name}: expected none, this model cuts no picture"):
        told.most_tiles(request, "video", 1, 0)


def test_tiles() -> None:
    """What is said of a kind counts, of another kind not."""
    both = SimpleNamespace(max_dynamic_patch=12, video_max_dynamic_patch=1)
    assert told.most_tiles(both, "video", 6, 12) == 1
    assert told.most_tiles(both, "image", 6, 12) == 12
    assert told.most_tiles(SimpleNamespace(), "image", 6, 12) == 6
