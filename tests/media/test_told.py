"""What a request says about its media is read, or refused."""

from __future__ import annotations

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
