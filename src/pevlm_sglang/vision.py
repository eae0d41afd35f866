"""Corrections of SGLang's vision path, for all requests of a PEVLM server.

Two places of SGLang 0.5.23 compute something else than Qwen2.5-VL's reference in transformers, both
worse the longer the video is:

- **Temporal positions.** The sampled video's frame rate is not passed to the processor, which then
  assumes 24 frames a second. At 2 sampled frames a second, temporal positions advance 12 times too
  slowly (sglang/srt/multimodal/processors/qwen_vl.py, ``_process_mm_data_uncached``).
- **Vision tower.** Its full-attention layers attend over the whole video, where the reference
  attends within each step: wrong features, at a cost quadratic in the length of the video
  (sglang/srt/models/qwen2_5_vl.py, ``Qwen2_5_VisionTransformer.forward``).

InternVL3.5's deviations are listed in :mod:`pevlm_sglang.processors.internvl_frames` and at
:func:`fix_placeholders`.

``--pevlm-vision-fixes false`` gives SGLang's own behaviour back.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch

from pevlm_sglang.config import PevlmConfig
from pevlm_sglang.support import UnsupportedError

MODEL_TYPE = "qwen2_5_vl"
INTERNVL = "internvl_chat"
TEMPORAL_POSITIONS = "temporal positions follow the sampled frame rate"
PER_STEP_TOWER = "the vision tower attends within each step"
INTERNVL_CORRECTIONS = (
    "frames are the middles of equal segments of the video",
    "frames and images are resized with antialiasing, and keep the model's precision",
    "frames are numbered Frame1: as in the reference",
    "videos and images may stand in any order",
)
"""The first three are :mod:`pevlm_sglang.processors.internvl_frames`."""

_METADATA = "pevlm_video_metadata"


def install(model_type: str, config: PevlmConfig) -> tuple[str, ...]:
    """Install the corrections that a model needs, in the scheduler.

    Returns:
        What is corrected, in words, for the log and ``/server_info``.

    Raises:
        UnsupportedError: this SGLang lacks a seam that they need.
    """
    if config.vision_fixes and model_type == INTERNVL:
        fix_placeholders()
        return INTERNVL_CORRECTIONS
    if not config.vision_fixes or model_type != MODEL_TYPE:
        return ()
    fix_positions()
    fix_tower()
    return (TEMPORAL_POSITIONS, PER_STEP_TOWER)


def split_into_steps(grid_thw: torch.Tensor) -> torch.Tensor:
    """``[n, 3]`` rows (T, H, W) → ``[sum(T), 3]`` rows (1, H, W).

    The tower builds its attention segments, windows and positions from rows of the grid; with a row
    a step, each comes out as in the reference (transformers' ``repeat_interleave(h * w, t)``).
    """
    steps = grid_thw.repeat_interleave(grid_thw[:, 0], dim=0)
    steps[:, 0] = 1
    return steps


def fix_tower() -> None:
    """Make Qwen2.5-VL's vision tower attend within each step. Runs in the scheduler."""
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def corrected(self: Any, x: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
            return forward(self, x, split_into_steps(grid_thw))

        return corrected

    _wrap(Qwen2_5_VisionTransformer, "forward", wrap)


def fix_placeholders() -> None:
    """Make each placeholder of InternVL that of its own item. Runs in the scheduler.

    SGLang hands out pad values in the order of its items, images first, to the prompt's ``<img>``
    one by one: a video before an image takes the image's, and both get wrong features
    (sglang/srt/models/internvl.py, ``pad_input_ids``). The items' offsets say what is whose.
    """
    from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens
    from sglang.srt.models.internvl import InternVLChatModel

    def wrap(pad_input_ids: Callable[..., Any]) -> Callable[..., Any]:
        def corrected(self: Any, input_ids: Any, mm_inputs: Any) -> Any:
            pattern = MultiModalityDataPaddingPatternMultimodalTokens()
            return pattern.pad_input_tokens(input_ids, mm_inputs)

        return corrected

    _wrap(InternVLChatModel, "pad_input_ids", wrap)


def fix_positions() -> None:
    """Give Qwen2.5-VL's processor the frame rate. Runs in the launcher and in the scheduler."""
    from sglang.srt.managers.schedule_batch import MultimodalDataItem
    from sglang.srt.multimodal.processors import qwen_vl

    _wrap(qwen_vl, "preprocess_video", _keep_metadata)
    _wrap(qwen_vl.QwenVLImageProcessor, "process_and_combine_mm_data_async", _pass_metadata)
    _wrap(MultimodalDataItem, "set_pad_value", _hash_frame_rate)


def _wrap(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        raise UnsupportedError(
            f"this SGLang has no {owner.__name__}.{name}, which the corrections need; install "
            "sglang>=0.5.21 (developed on 0.5.23), or serve with --pevlm-vision-fixes false"
        )
    if not hasattr(original, "pevlm_original"):
        corrected = functools.wraps(original)(wrap(original))
        corrected.pevlm_original = original  # type: ignore[attr-defined]
        setattr(owner, name, corrected)


def _keep_metadata(preprocess_video: Callable[..., Any]) -> Callable[..., Any]:
    """Let the sampled frames carry their metadata, which SGLang drops for this model."""

    async def corrected(*args: Any, **kwargs: Any) -> Any:
        video, metadata = await preprocess_video(*args, **kwargs)
        if metadata is not None:
            setattr(video, _METADATA, metadata)
        return video, metadata

    return corrected


def _pass_metadata(process: Callable[..., Any]) -> Callable[..., Any]:
    """Hand the metadata to the processor, as SGLang does for Qwen3-VL."""

    async def corrected(self: Any, base_output: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = [getattr(video, _METADATA, None) for video in base_output.videos or ()]
        if self.hf_config.model_type == MODEL_TYPE and metadata and None not in metadata:
            kwargs |= {"video_metadata": metadata, "do_sample_frames": False}
        return await process(self, base_output, *args, **kwargs)

    return corrected


def _hash_frame_rate(set_pad_value: Callable[..., Any]) -> Callable[..., Any]:
    """Make the frame rate part of a video's identity.

    Prefix caching knows a video by a hash of its features. The same frames at another rate now have
    other positions, and so another KV.
    """

    def corrected(self: Any) -> None:
        known = self.pad_value is not None
        set_pad_value(self)
        seconds = self.model_specific_data.get("second_per_grid_ts")
        if known or seconds is None:
            return
        rates = [float(second) for second in seconds]
        digest = hashlib.sha256(f"{self.hash}:{rates}".encode()).digest()
        self.set_hash(int.from_bytes(digest[:8], "big"))

    return corrected
