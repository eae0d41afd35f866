"""SGLang's multimodal processors, completed: one subclass a model family, beside its ``families``.

A processor turns a request's text and media into tokens and features. It runs in the launcher,
before the scheduler sees the request; a ``ValueError`` there is HTTP 400.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from pevlm_sglang.support import UnsupportedError

_QWEN_VL = "pevlm_sglang.processors.qwen_vl:QwenVLProcessor"

_PROCESSORS: dict[str, str] = {
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN_VL,
    "InternVLChatModel": "pevlm_sglang.processors.internvl:PevlmInternVLProcessor",
    "LlavaQwenForCausalLM": "pevlm_sglang.processors.llava_video:LlavaVideoProcessor",
    "LlavaLlamaModel": "pevlm_sglang.processors.longvila:LongVilaProcessor",
}
"""Architecture → the class to use in place of SGLang's on a server with PEVLM, or where SGLang has
none; as ``module:name``."""

_MENDED: dict[str, str] = {
    "NVILAForConditionalGeneration": "pevlm_sglang.processors.nvila:NvilaProcessor",
    "NVILALiteForConditionalGeneration": "pevlm_sglang.processors.nvila:NvilaProcessor",
}
"""The same, of models that PEVLM does not serve, whose videos fail with SGLang's own class."""

_CHAT_TEMPLATES: dict[str, str] = {"LlavaQwenForCausalLM": "chatml-llava"}
"""Architecture → the chat template of SGLang that writes its placeholders. The one in the published
checkpoint is of the language model alone, and drops them."""


def for_architectures(
    upstream: type | None, architectures: Iterable[str], *, with_pevlm: bool = True
) -> type | None:
    """The processor class of a model.

    Args:
        upstream: the class that SGLang would take.
        architectures: of the model's configuration.
        with_pevlm: whether the server is one with PEVLM.

    Returns:
        This plugin's class, or ``upstream`` where the plugin has none.
    """
    ours = _MENDED if upstream is not None and not with_pevlm else {**_PROCESSORS, **_MENDED}
    for name in architectures:
        if name in ours:
            processor: Any = pkgutil.resolve_name(ours[name])
            return processor
    return upstream


def check_launch(hf_config: Any, video_config: Mapping[str, Any]) -> None:
    """Refuse video settings of a server before it starts, as far as the processor can tell.

    Args:
        hf_config: of the model.
        video_config: the ``video`` section of SGLang's ``--mm-process-config``.

    Raises:
        UnsupportedError: an unknown name, or a bad value.
    """
    processor: Any = for_architectures(None, hf_config.architectures or ())
    if processor is None:
        return
    try:
        processor.check_launch(hf_config, video_config)
    except ValueError as error:
        raise UnsupportedError(f"--mm-process-config: {error}") from None


def offer_chat_template(architectures: Iterable[str], model_path: str) -> None:
    """Make SGLang choose the chat template of a model that it does not know by its path.

    ``--chat-template`` takes precedence.
    """
    from sglang.srt.parser.conversation import register_conv_template_matching_function

    for name in architectures:
        if template := _CHAT_TEMPLATES.get(name):
            register_conv_template_matching_function(
                lambda path, template=template: template if path == model_path else None
            )
