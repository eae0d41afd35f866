"""processors/ and corrections/: whose class is taken, and what a broken video file costs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pevlm_sglang import corrections
from pevlm_sglang.families import registry as processors
from pevlm_sglang.media.video_file import decoding, frames_of, length_and_rate
from pevlm_sglang.settings.refusals import UnsupportedError

QWEN = "Qwen2_5_VLForConditionalGeneration"
LLAVA = "LlavaQwenForCausalLM"


class Foreign:
    """A class that another package put in SGLang's place."""


def sglang_s(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(module), name)


def test_sglang_s_own_processor_is_replaced() -> None:
    upstream = sglang_s("sglang.srt.multimodal.processors.qwen_vl", "QwenVLImageProcessor")
    ours = processors.for_architectures(upstream, [QWEN])
    assert ours is not upstream
    assert issubclass(ours, upstream)
    assert processors.for_architectures(upstream, [QWEN], with_pevlm=False) is upstream
    assert processors.for_architectures(upstream, ["LlamaForCausalLM"]) is upstream


def test_another_processor_is_not_replaced() -> None:
    pytest.importorskip("sglang")
    with pytest.raises(UnsupportedError, match=rf"^{QWEN}: expected SGLang's own .* got .*Foreign"):
        processors.for_architectures(Foreign, [QWEN])
    nvila = "NVILAForConditionalGeneration"
    assert processors.for_architectures(Foreign, [nvila], with_pevlm=False) is Foreign


def test_another_model_is_not_replaced() -> None:
    upstream = sglang_s("sglang.srt.models.llava", "LlavaQwenForCausalLM")
    assert issubclass(corrections.for_architecture(upstream, LLAVA), upstream)
    assert corrections.for_architecture(Foreign, "LlamaForCausalLM") is Foreign
    with pytest.raises(UnsupportedError, match=rf"^{LLAVA}: expected SGLang's own model, got"):
        corrections.for_architecture(Foreign, LLAVA)


def test_own_chat_template_comes_before_a_match_of_the_path() -> None:
    conversation = pytest.importorskip("sglang.srt.parser.conversation")
    known = list(conversation.matching_function_registry)
    path = "/models/internvl_and_others/LLaVA-Video-7B-Qwen2"
    try:
        processors.offer_chat_template([LLAVA], path)
        assert conversation.get_conv_template_by_model_path(path) == "chatml-llava"
        other = "/models/InternVL3_5-8B"
        assert conversation.get_conv_template_by_model_path(other) == "internvl-2-5"
    finally:
        conversation.matching_function_registry[:] = known


@pytest.mark.parametrize("rate", [None, 0, float("nan"), float("inf"), -1.0])
def test_file_without_a_rate_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="video: expected a frame rate, got"):
        length_and_rate(Video(3, rate))


def test_file_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="video: expected at least one frame, got none"):
        length_and_rate(Video(0, 25.0))


def test_length_and_rate() -> None:
    assert length_and_rate(Video(70, 25)) == (70, 25.0)


def test_frames_come_in_parts_and_in_order() -> None:
    video = Video(100, 25.0)
    indices = [*range(0, 100, 2)]
    assert [int(frame[0, 0, 0]) for frame in frames_of(video, indices)] == indices
    assert video.largest == 32


def test_stream_that_breaks_off_is_refused() -> None:
    with pytest.raises(ValueError, match="video: could not be decoded: no more packets"):
        list(frames_of(Video(100, 25.0, broken_at=40), range(100)))


def test_lack_of_memory_is_nobody_s_mistake() -> None:
    with pytest.raises(torch.OutOfMemoryError), decoding():
        raise torch.OutOfMemoryError("CUDA out of memory")


class Video:
    """The part of SGLang's ``VideoDecoderWrapper`` that is read."""

    def __init__(self, frames: int, rate: Any, broken_at: int | None = None) -> None:
        self.frames, self.avg_fps, self.broken_at = frames, rate, broken_at
        self.largest = 0

    def __len__(self) -> int:
        return self.frames

    def get_frames_at(self, indices: list[int]) -> Iterator[np.ndarray]:
        self.largest = max(self.largest, len(indices))
        if self.broken_at is not None and max(indices) >= self.broken_at:
            raise RuntimeError("no more packets")
        return iter([np.full((2, 2, 3), i, np.uint8) for i in indices])


def test_settings_that_sglang_reads_are_its_own_without_corrections() -> None:
    pytest.importorskip("sglang")
    vision = SimpleNamespace(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    config = SimpleNamespace(architectures=[QWEN], model_type="qwen2_5_vl", vision_config=vision)
    processors.check_launch(config, {"do_resize": False}, vision_fixes=False)
    with pytest.raises(UnsupportedError, match="video knob do_resize: expected one of"):
        processors.check_launch(config, {"do_resize": False})
