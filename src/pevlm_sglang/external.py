"""Models that this plugin brings, put into SGLang's registries.

SGLang's own way in is three environment variables (``SGLANG_EXTERNAL_MODEL_PACKAGE``,
``SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE``, ``SGLANG_EXTERNAL_MM_MODEL_ARCH``), which hold one value
each. What SGLang does with them is done here directly, so that they stay free for another package;
a model class of that package comes first.
"""

from __future__ import annotations

from collections.abc import Iterable

from pevlm_sglang.families.longvila.spans import ARCHITECTURES


def register_checkpoints() -> None:
    """Teach transformers and SGLang to read the checkpoints; in every process of a server."""
    from sglang.srt.configs.model_config import multimodal_model_archs
    from sglang.srt.multimodal.customized_mm_processor_utils import register_customized_processor
    from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY
    from transformers import AutoConfig, AutoTokenizer

    from pevlm_sglang.families.longvila.checkpoint import (
        MODEL_TYPE,
        VilaConfig,
        VilaProcessor,
        VilaTokenizer,
    )

    AutoConfig.register(MODEL_TYPE, VilaConfig, exist_ok=True)
    AutoTokenizer.register(VilaConfig, VilaTokenizer, exist_ok=True)
    _CONFIG_REGISTRY.setdefault(MODEL_TYPE, VilaConfig)
    register_customized_processor(VilaProcessor)(VilaConfig)
    multimodal_model_archs.extend(a for a in ARCHITECTURES if a not in multimodal_model_archs)


def register_models(architectures: Iterable[str]) -> None:
    """Put in the model classes, once a model of this plugin is about to be loaded.

    Not earlier: SGLang's registry imports every model that it has.
    """
    if not any(name in ARCHITECTURES for name in architectures):
        return
    from sglang.srt.models.registry import ModelRegistry, import_model_classes

    for name, model in import_model_classes("pevlm_sglang.models", strict=True).items():
        ModelRegistry.models.setdefault(name, model)
