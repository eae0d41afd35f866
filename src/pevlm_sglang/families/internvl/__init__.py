"""InternVL3.5. Where SGLang differs from its reference is said in ``tiles.py`` and
``placeholders.py``."""

from __future__ import annotations

from pevlm_sglang.families.family import Family
from pevlm_sglang.families.internvl import sizes, spans

INTERNVL = Family(
    name="internvl",
    checkpoints={
        "InternVLChatModel": "InternVL3.5 4B, 8B, 14B, 30B-A3B (Qwen3 or Qwen3-MoE; not `-HF`)"
    },
    spans=spans,
    sizes=sizes,
    corrections={
        "InternVLChatModel": (
            "frames are the middles of equal segments of the video",
            "frames and images are resized with antialiasing, and keep the model's precision",
            "frames are numbered Frame1: as in the reference",
            "videos and images may stand in any order",
        )
    },
    processor="internvl.processor:PevlmInternVLProcessor",
    install_in_scheduler="internvl.placeholders:install",
)
