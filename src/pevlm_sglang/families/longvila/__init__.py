"""LongVILA, which SGLang alone cannot load."""

from __future__ import annotations

from pevlm_sglang.families.family import Family
from pevlm_sglang.families.longvila import sizes, spans

LONGVILA = Family(
    name="longvila",
    checkpoints={"LlavaLlamaModel": "LongVILA-7B-256f"},
    spans=spans,
    sizes=sizes,
    corrections={"LlavaLlamaModel": ()},
    processor="longvila.processor:LongVilaProcessor",
    model="longvila.model:LlavaLlamaModel",
    read_checkpoint="longvila.checkpoint:register",
)
