"""Corrections of SGLang's vision path, for all requests of a PEVLM server.

Places where SGLang 0.5.23 computes something else than the reference, transformers with
qwen-vl-utils:

- **Sampling.** Frame numbers are truncated where the reference rounds: neighbouring frames, earlier
  by up to one (sglang/srt/multimodal/processors/qwen_vl.py, ``preprocess_video``).
- **Resizing.** Bilinear where the reference is bicubic, and to multiples of 28 pixels also for
  Qwen3-VL, whose video processor then resizes once more, to a size that depends on the length of
  the video (same function).
- **Temporal positions**, Qwen2.5-VL. The sampled video's frame rate is not passed to the processor,
  which then assumes 24 frames a second. At 2 sampled frames a second, temporal positions advance 12
  times too slowly (same file, ``_process_mm_data_uncached``).
- **Vision tower**, Qwen2.5-VL. Its full-attention layers attend over the whole video, where the
  reference attends within each step: wrong features, at a cost quadratic in the length of the video
  (sglang/srt/models/qwen2_5_vl.py, ``Qwen2_5_VisionTransformer.forward``).

The first three are corrected by the processor (``processors/qwen_vl.py``), the last one here.
InternVL3.5's deviations are listed in ``processors/internvl_frames.py`` and at
:func:`fix_placeholders`. ``embeddings.py`` holds one more correction, for all models, which saves
work and changes no value.
``--pevlm-vision-fixes false`` gives SGLang's own behaviour back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from pevlm_sglang.seams import wrap
from pevlm_sglang.settings.config import PevlmConfig

SAMPLING = "frames are sampled as by qwen-vl-utils"
RESIZING = "frames are resized as by qwen-vl-utils"
TEMPORAL_POSITIONS = "temporal positions follow the sampled frame rate"
PER_STEP_TOWER = "the vision tower attends within each step"
ANY_ORDER = "videos and images may stand in any order"

CORRECTIONS: dict[str, tuple[str, ...]] = {
    "qwen2_vl": (SAMPLING, RESIZING),
    "qwen2_5_vl": (SAMPLING, RESIZING, TEMPORAL_POSITIONS, PER_STEP_TOWER),
    "qwen3_vl": (SAMPLING, RESIZING),
    "qwen3_vl_moe": (SAMPLING, RESIZING),
    "internvl_chat": (
        "frames are the middles of equal segments of the video",
        "frames and images are resized with antialiasing, and keep the model's precision",
        "frames are numbered Frame1: as in the reference",
        ANY_ORDER,
    ),
}
"""Model type → what is corrected, in words, for the log and ``/server_info``."""


def install(model_type: str, config: PevlmConfig) -> tuple[str, ...]:
    """Install the corrections that a model needs, in the scheduler.

    Returns:
        What is corrected; the launcher's part of it too.

    Raises:
        UnsupportedError: this SGLang lacks a seam that they need.
    """
    corrections = CORRECTIONS.get(model_type, ()) if config.vision_fixes else ()
    if TEMPORAL_POSITIONS in corrections:
        hash_frame_rates()
    if PER_STEP_TOWER in corrections:
        fix_tower()
    if ANY_ORDER in corrections:
        fix_placeholders()
    return corrections


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

    def per_step(forward: Callable[..., Any]) -> Callable[..., Any]:
        def corrected(self: Any, x: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
            return forward(self, x, split_into_steps(grid_thw))

        return corrected

    wrap(Qwen2_5_VisionTransformer, "forward", per_step)


def fix_placeholders() -> None:
    """Make each placeholder of InternVL that of its own item. Runs in the scheduler.

    SGLang hands out pad values in the order of its items, images first, to the prompt's ``<img>``
    one by one: a video before an image takes the image's, and both get wrong features
    (sglang/srt/models/internvl.py, ``pad_input_ids``). The items' offsets say what is whose.
    """
    from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens
    from sglang.srt.models.internvl import InternVLChatModel

    def by_offsets(pad_input_ids: Callable[..., Any]) -> Callable[..., Any]:
        def corrected(self: Any, input_ids: Any, mm_inputs: Any) -> Any:
            pattern = MultiModalityDataPaddingPatternMultimodalTokens()
            return pattern.pad_input_tokens(input_ids, mm_inputs)

        return corrected

    wrap(InternVLChatModel, "pad_input_ids", by_offsets)


def hash_frame_rates() -> None:
    """Tell videos apart by their frame rate too. Runs in the launcher and in the scheduler."""
    from sglang.srt.managers.schedule_batch import MultimodalDataItem

    wrap(MultimodalDataItem, "set_pad_value", _hash_frame_rate)


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
