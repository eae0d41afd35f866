"""The Hugging Face processor of a checkpoint, where SGLang's own loading of it falls short.

The published LLaVA-Video-7B-Qwen2 has a tokenizer and no processor files; its images are
preprocessed as its vision tower was trained, by the tower's image processor. And the reference
resizes with PIL, from whose result that of torchvision differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(
    get_processor: Callable[..., Any], tokenizer_name: str, *args: Any, **kwargs: Any
) -> Any:
    """SGLang's ``get_processor``, completed for LLaVA-Video.

    Args:
        get_processor: SGLang's own.
        tokenizer_name: directory or repository of the tokenizer.
        args, kwargs: of ``get_processor``; ``model_name`` is the model's directory or repository.
    """
    from sglang.srt.utils.hf_transformers.common import resolve_runai_obj_uri
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer
    from transformers import AutoImageProcessor, LlavaProcessor, PretrainedConfig

    revision = kwargs.get("revision")
    if kwargs.get("image_processor_backend") in (None, "auto"):
        kwargs["image_processor_backend"] = "pil"
    if any(_has_file(tokenizer_name, name, revision) for name in _FILES):
        return get_processor(tokenizer_name, *args, **kwargs)
    model = resolve_runai_obj_uri(kwargs.get("model_name") or tokenizer_name)
    config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(
            config["mm_vision_tower"], backend=kwargs["image_processor_backend"]
        ),
        tokenizer=get_tokenizer(
            tokenizer_name,
            tokenizer_mode=kwargs.get("tokenizer_mode", "auto"),
            trust_remote_code=kwargs.get("trust_remote_code", False),
            tokenizer_revision=revision,
        ),
    )


def _has_file(repository: str, name: str, revision: str | None) -> bool:
    from transformers.utils import cached_file

    found = cached_file(
        repository,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None
