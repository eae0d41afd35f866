"""SGLang's multimodal processors, completed: one subclass a model family, beside its ``families``.

A processor turns a request's text and media into tokens and features. It runs in the launcher,
before the scheduler sees the request; a ``ValueError`` there is HTTP 400.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from pevlm_sglang.settings.refusals import UnsupportedError

_QWEN_VL = "pevlm_sglang.families.qwen_vl.processor:QwenVLProcessor"

_PROCESSORS: dict[str, str] = {
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN_VL,
    "InternVLChatModel": "pevlm_sglang.families.internvl.processor:PevlmInternVLProcessor",
    "LlavaQwenForCausalLM": "pevlm_sglang.families.llava_video.processor:LlavaVideoProcessor",
    "LlavaLlamaModel": "pevlm_sglang.families.longvila.processor:LongVilaProcessor",
}
"""Architecture → the class to use in place of SGLang's on a server with PEVLM, or where SGLang has
none; as ``module:name``."""

_MENDED: dict[str, str] = {
    "NVILAForConditionalGeneration": "pevlm_sglang.families.registry.nvila:NvilaProcessor",
    "NVILALiteForConditionalGeneration": "pevlm_sglang.families.registry.nvila:NvilaProcessor",
    "JetVLMForConditionalGeneration": "pevlm_sglang.families.registry.nvila:NvilaProcessor",
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

    Raises:
        UnsupportedError: on a server with PEVLM, a class that is not SGLang's own.
    """
    ours = _MENDED if upstream is not None and not with_pevlm else {**_PROCESSORS, **_MENDED}
    for name in architectures:
        if name in ours:
            processor: Any = pkgutil.resolve_name(ours[name])
            if upstream is None or issubclass(processor, upstream):
                return processor
            if with_pevlm:  # without our class, the video is not what this server says it is
                raise UnsupportedError(
                    f"{name}: expected SGLang's own multimodal processor, got {upstream.__module__}"
                    f".{upstream.__name__}; leave out what put it there, or serve without "
                    "--attention-backend pevlm"
                )
    return upstream


def check_launch(
    hf_config: Any, video_config: Mapping[str, Any], *, vision_fixes: bool = True
) -> None:
    """Refuse video settings of a server before it starts, as far as the processor can tell.

    Args:
        hf_config: of the model.
        video_config: the ``video`` section of SGLang's ``--mm-process-config``.
        vision_fixes: of the server. Without them SGLang itself reads the settings of Qwen's models,
            and takes more names than this plugin.

    Raises:
        UnsupportedError: an unknown name, or a bad value.
    """
    found = [_PROCESSORS[name] for name in hf_config.architectures or () if name in _PROCESSORS]
    if not found or (found[0] == _QWEN_VL and not vision_fixes):
        return
    try:
        pkgutil.resolve_name(found[0]).check_launch(hf_config, video_config)
    except ValueError as error:
        raise UnsupportedError(f"--mm-process-config: {error}") from None


def offer_chat_template(architectures: Iterable[str], model_path: str) -> None:
    """Make SGLang choose the chat template of a model that it does not know by its path.

    ``--chat-template`` takes precedence.
    """
    from sglang.srt.parser.conversation import matching_function_registry

    for name in architectures:
        if template := _CHAT_TEMPLATES.get(name):
            # First, because SGLang's own look for other models' names anywhere in the path.
            matching_function_registry.insert(
                0, lambda path, template=template: template if path == model_path else None
            )
