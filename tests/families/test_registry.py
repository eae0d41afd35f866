"""The one table: whose class is taken, what is refused at the launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.families import registry

QWEN = "Qwen2_5_VLForConditionalGeneration"
LLAVA = "LlavaQwenForCausalLM"


class Foreign:
    """A class that another package put in SGLang's place."""


def sglang_s(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(module), name)


def model(architecture: str) -> SimpleNamespace:
    return SimpleNamespace(architectures=[architecture])


@pytest.mark.parametrize(
    ("architecture", "module", "name"),
    [
        (QWEN, "sglang.srt.multimodal.processors.qwen_vl", "QwenVLImageProcessor"),
        ("InternVLChatModel", "sglang.srt.multimodal.processors.internvl", "InternVLProcessor"),
        (LLAVA, "sglang.srt.multimodal.processors.llava", "LlavaImageProcessor"),
    ],
)
def test_sglang_s_own_processor_is_replaced(architecture: str, module: str, name: str) -> None:
    upstream = sglang_s(module, name)
    ours = registry.processor_class(upstream, model(architecture))
    assert ours is not upstream
    assert issubclass(ours, upstream)


@pytest.mark.parametrize("family", registry.FAMILIES, ids=lambda family: family.architectures[0])
def test_another_processor_is_not_replaced(family: Any) -> None:
    pytest.importorskip("sglang")
    for name in family.architectures:
        with pytest.raises(UnsupportedError, match=rf"{name}.*: expected SGLang's own .* got .*Fo"):
            registry.processor_class(Foreign, model(name))


def test_another_model_is_not_replaced() -> None:
    upstream = sglang_s("sglang.srt.models.llava", "LlavaQwenForCausalLM")
    assert issubclass(registry.model_class(upstream, LLAVA), upstream)
    assert registry.model_class(Foreign, "LlamaForCausalLM") is Foreign
    assert registry.model_class(Foreign, QWEN) is Foreign
    with pytest.raises(UnsupportedError, match=rf"^{LLAVA}: expected SGLang's own model, got"):
        registry.model_class(Foreign, LLAVA)


@pytest.mark.parametrize("family", registry.FAMILIES, ids=lambda family: family.architectures[0])
def test_a_family_is_whole(family: Any) -> None:
    """Its parts can be loaded, and speak of its own architectures alone."""
    pytest.importorskip("sglang")
    for part in ("processor", "model", "read_checkpoint", "load_processor"):
        assert (family.load(part) is None) == (getattr(family, part) is None)
    assert family.load("processor").__module__.startswith(f"pevlm_sglang.families.{family.name}.")
    assert set(family.corrections) == set(family.checkpoints)
    assert set(family.names()[1]) <= {"fps", "max_frames", "max_pixels", "frames"}
    assert family.sizes.PUBLISHED


def test_every_architecture_is_of_one_family() -> None:
    names = [name for family in registry.FAMILIES for name in family.architectures]
    assert len(names) == len(set(names))
    assert not set(names) & set(registry.REASONS)


def test_own_chat_template_comes_before_a_match_of_the_path() -> None:
    conversation = pytest.importorskip("sglang.srt.parser.conversation")
    known = list(conversation.matching_function_registry)
    path = "/models/internvl_and_others/LLaVA-Video-7B-Qwen2"
    try:
        registry.offer_chat_template(registry.family_of([LLAVA]), path)
        assert conversation.get_conv_template_by_model_path(path) == "chatml-llava"
        other = "/models/InternVL3_5-8B"
        assert conversation.get_conv_template_by_model_path(other) == "internvl-2-5"
    finally:
        conversation.matching_function_registry[:] = known


def test_settings_that_no_processor_knows_are_refused() -> None:
    pytest.importorskip("sglang")
    vision = SimpleNamespace(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    config = SimpleNamespace(architectures=[QWEN], model_type="qwen2_5_vl", vision_config=vision)
    with pytest.raises(UnsupportedError, match="video setting do_resize: expected one of"):
        registry.check_launch(config, {"do_resize": False})
