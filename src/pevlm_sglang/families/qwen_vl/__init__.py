"""Qwen2-VL, Qwen2.5-VL, and Qwen3-VL with its mixture of experts.

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
  reference attends within each step (``tower.py``).
"""

from __future__ import annotations

import dataclasses

from pevlm_sglang.families.family import Family
from pevlm_sglang.families.qwen_vl import sizes, spans, timestamps

VIDEO = ("frames are sampled as by qwen-vl-utils", "frames are resized as by qwen-vl-utils")

QWEN2_VL = Family(
    name="qwen_vl",
    checkpoints={
        "Qwen2VLForConditionalGeneration": "Qwen2-VL 2B to 72B",
        "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL 3B to 72B",
    },
    spans=spans,
    sizes=sizes,
    corrections={
        "Qwen2VLForConditionalGeneration": VIDEO,
        "Qwen2_5_VLForConditionalGeneration": (
            *VIDEO,
            "temporal positions follow the sampled frame rate",
            "the vision tower attends within each step",
        ),
    },
    processor="qwen_vl.processor:QwenVLProcessor",
    needless="qwen_vl.processor:needless_corrections",
    install_in_scheduler="qwen_vl.tower:install",
    gpu_pixels=True,
)

QWEN3_VL = dataclasses.replace(
    QWEN2_VL,
    checkpoints={
        "Qwen3VLForConditionalGeneration": "Qwen3-VL 2B, 4B, 8B, 32B",
        "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL 30B-A3B, 235B-A22B",
    },
    spans=timestamps,
    corrections={
        "Qwen3VLForConditionalGeneration": VIDEO,
        "Qwen3VLMoeForConditionalGeneration": VIDEO,
    },
    install_in_scheduler=None,
)
