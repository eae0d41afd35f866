"""Models that SGLang serves and PEVLM refuses, with the reason, so that nobody has to guess."""

from __future__ import annotations

_BIDIRECTIONAL = "its image tokens attend to each other in both directions"
_PRUNED = "it prunes video tokens after the vision tower (EVS), so where frames lie is not known"
_LINEAR = "it mixes tokens outside attention (linear attention, convolution or state space)"
_MLA = "it has multi-head latent attention"
_CROSS = "it reads frames through cross-attention"
_OMNI = "it interleaves audio with the frames of a video"
_CHUNKED = "its attention is chunked or interleaved with layers without positions"
_PACKED = "its resampler may pack several frames into the same tokens"
_WINDOW = "it has sliding-window attention"

REASONS: dict[str, str] = {
    "Gemma3ForConditionalGeneration": _BIDIRECTIONAL,
    "Gemma3nForConditionalGeneration": _WINDOW,
    "Gemma4ForConditionalGeneration": _BIDIRECTIONAL,
    "Gemma4UnifiedForConditionalGeneration": _BIDIRECTIONAL,
    "NemotronH_Nano_VL_V2": _PRUNED,
    "NemotronH_Nano_Omni_Reasoning_V3": _PRUNED,
    "NemotronH_Omni_Reasoning_V3": _PRUNED,
    "Qwen3_5ForConditionalGeneration": _LINEAR,
    "Qwen3_5MoeForConditionalGeneration": _LINEAR,
    "Qwen4ExpForConditionalGeneration": _LINEAR,
    "InternS2PreviewForConditionalGeneration": _LINEAR,
    "InternS2MobiusForConditionalGeneration": _LINEAR,
    "JetVLMForConditionalGeneration": _LINEAR,
    "Lfm2VlForConditionalGeneration": _LINEAR,
    "Qwen3OmniMoeForConditionalGeneration": _OMNI,
    "MiniCPMO": _OMNI,
    "KimiVLForConditionalGeneration": _MLA,
    "KimiK25ForConditionalGeneration": _MLA,
    "KimiK3ForConditionalGeneration": _MLA,
    "DotsVLMForCausalLM": _MLA,
    "MllamaForConditionalGeneration": _CROSS,
    "MossVLForConditionalGeneration": _CROSS,
    "WhisperForConditionalGeneration": _CROSS,
    "Llama4ForConditionalGeneration": _CHUNKED,
    "MiniCPMV": _PACKED,
}
"""Architecture → why its frames cannot be split, or its attention not be PEVLM's."""
