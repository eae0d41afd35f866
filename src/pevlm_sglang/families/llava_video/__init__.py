"""LLaVA-Video. Where SGLang differs from its reference is said in ``model.py`` and
``processor.py``."""

from __future__ import annotations

from pevlm_sglang.families.family import Family
from pevlm_sglang.families.llava_video import sizes, spans

LLAVA_VIDEO = Family(
    name="llava_video",
    checkpoints={"LlavaQwenForCausalLM": "LLaVA-Video-7B-Qwen2"},
    spans=spans,
    sizes=sizes,
    corrections={
        "LlavaQwenForCausalLM": (
            "video and image features, newline tokens and their layout follow LLaVA-NeXT",
            "the vision tower runs in the server's numeric type",
        )
    },
    processor="llava_video.processor:LlavaVideoProcessor",
    model="llava_video.model:LlavaQwenForCausalLM",
    load_processor="llava_video.checkpoint:load_processor",
    # The template in the published checkpoint is of the language model alone, and drops images.
    chat_template="chatml-llava",
    sent_by='`video_url`; a list of `image_url` with `"modalities": "video"`',
)
