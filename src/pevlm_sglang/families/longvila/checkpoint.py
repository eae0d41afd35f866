"""The published layout of VILA checkpoints: configuration, tokenizer and image processor.

A checkpoint is a ``config.json`` (``model_type: llava_llama``, ``architectures:
["LlavaLlamaModel"]``) beside three directories, each a checkpoint of its own: ``llm/`` (language
model and tokenizer), ``vision_tower/`` (SigLIP and its image processor) and ``mm_projector/``. The
copies of the three configurations inside ``config.json`` are not read: the reference does not, and
LongVILA's context extension rewrites ``llm/`` alone (longvila/train/4_extend_llm_64k.sh).

Source: github.com/NVlabs/VILA, ``llava/model/{llava_arch,configuration_llava}.py``,
``llava/model/language_model/builder.py``, ``llava/utils/{media,tokenizer}.py``. The files of
Efficient-Large-Model/qwen2-7b-longvila-256f itself were not at hand: frame size, projector and
frame count are taken from whatever the checkpoint says, and what is not supported is refused.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from pevlm_sglang.families.longvila.sizes import DEFAULT_NUM_FRAMES, DOWNSAMPLE, LongVilaGeometry

MODEL_TYPE = "llava_llama"
ARCHITECTURE = "LlavaLlamaModel"
IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<vila/video>"

_LLM, _TOWER, _PROJECTOR = "llm", "vision_tower", "mm_projector"
WEIGHT_FILES = "[lvm][lim]*/*.safetensors"  # of these three directories


class VilaConfig(PretrainedConfig):
    """``config.json`` with the configurations of the three directories.

    Attributes:
        text_config: of ``llm/``, a ``Qwen2Config``.
        vision_config: of ``vision_tower/``, a ``SiglipVisionConfig``.
        mm_projector_type: of ``mm_projector/``, a key of ``DOWNSAMPLE``.
        num_video_frames: sampled from a video.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        mm_projector_type: str | None = None,
        num_video_frames: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, part in (("text_config", text_config), ("vision_config", vision_config)):
            if part is not None:  # of a checkpoint that was read
                setattr(self, name, AutoConfig.for_model(**part) if type(part) is dict else part)
        self.mm_projector_type = mm_projector_type
        self.num_video_frames = num_video_frames or DEFAULT_NUM_FRAMES
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> VilaConfig:
        """Read a checkpoint, local or on the hub.

        Raises:
            OSError: one of the directories has no ``config.json``.
            ValueError: a VILA model of a kind that is not served here.
        """
        config: VilaConfig = super().from_pretrained(path, **kwargs)
        where = _where(kwargs)
        config.text_config = AutoConfig.from_pretrained(path, subfolder=_LLM, **where)
        config.vision_config = AutoConfig.from_pretrained(path, subfolder=_TOWER, **where)
        projector, _ = PretrainedConfig.get_config_dict(path, subfolder=_PROJECTOR, **where)
        config.mm_projector_type = projector.get("mm_projector_type")
        config.check()
        return config

    @property
    def geometry(self) -> LongVilaGeometry:
        """Of a frame: 196 tokens at 384 pixels, 256 at 448."""
        return LongVilaGeometry(
            image_size=int(self.vision_config.image_size),
            patch_size=int(self.vision_config.patch_size),
            merge_size=DOWNSAMPLE[self.mm_projector_type or ""],
            num_frames=self.num_video_frames,
        )

    @property
    def tower_layers(self) -> int:
        """Layers of the tower before its features are taken."""
        layer = int(getattr(self, "mm_vision_select_layer", -2))
        depth = int(self.vision_config.num_hidden_layers)
        return layer if layer >= 0 else depth + 1 + layer

    def frame_text(self, kind: str) -> tuple[str, str]:
        """What stands before and after the tokens of a frame (``video``) or an image (``image``).

        Source: ``BasicImageEncoder`` and ``BasicVideoEncoder`` in ``llava/model/encoders``.
        """
        encoder = self.encoder(kind)
        return encoder.get("start_tokens") or "", encoder.get("end_tokens", "\n") or ""

    def encoder(self, kind: str) -> dict[str, Any]:
        """An encoder's settings, which older checkpoints leave out and newer ones write as text."""
        encoder = getattr(self, f"{kind}_encoder", None) or {}
        settings: dict[str, Any] = json.loads(encoder) if isinstance(encoder, str) else encoder
        return settings

    def check(self) -> None:
        """Refuse what is not served here.

        Raises:
            ValueError: names the setting, what was expected and what came.
        """
        said = self.to_dict()
        expected: list[tuple[str, Any, tuple[Any, ...]]] = [
            ("llm model_type", self.text_config.model_type, ("qwen2",)),
            ("vision_tower model_type", self.vision_config.model_type, ("siglip_vision_model",)),
            ("mm_projector_type", self.mm_projector_type, tuple(DOWNSAMPLE)),
            *((name, bool(said.get(name)), (False,)) for name in ("s2", "dynamic_s2", "ps3")),
            ("image_aspect_ratio", said.get("image_aspect_ratio"), (None, "resize", "dynamic")),
            ("mm_vision_select_feature", said.get("mm_vision_select_feature"), ("cls_patch",)),
        ]
        for kind, basic in (("video", "BasicVideoEncoder"), ("image", "BasicImageEncoder")):
            name = self.encoder(kind).get("_target_", basic).rsplit(".", 1)[-1]
            expected.append((f"{kind}_encoder", name, (basic,)))
        for name, value, allowed in expected:
            if value not in allowed:
                raise ValueError(
                    f"VILA checkpoint: {name}: expected {' or '.join(map(str, allowed))}, "
                    f"got {value}"
                )


# The reference builds a message's text part by part, with a media token for each image or video and
# none left in what the user wrote, and strips it; then it applies the tokenizer's own template.
_FLATTEN_PARTS = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}"
    "{%- set text.value = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] or [] -%}"
    "{%- if part['type'] == 'image' -%}{%- set text.value = text.value + '<image>' -%}"
    "{%- elif part['type'] == 'video' -%}{%- set text.value = text.value + '<vila/video>' -%}"
    "{%- else -%}{%- set text.value = text.value + part['text']"
    " | replace('<image>', '') | replace('<vila/video>', '') -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text.value | trim)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# What the reference's own template "qwen2" writes (llava/model/language_model/chat_templates).
_QWEN2_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class VilaTokenizer:
    """Loads the tokenizer in ``llm/``; stands in for a tokenizer class in ``AutoTokenizer``."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer with the media tokens, and a chat template that takes media parts."""
        kwargs.pop("subfolder", None)
        tokenizer = AutoTokenizer.from_pretrained(path, *args, subfolder=_LLM, **kwargs)
        tokenizer.add_tokens([IMAGE_TOKEN, VIDEO_TOKEN], special_tokens=True)
        settings, _ = PretrainedConfig.get_config_dict(path, **_where(kwargs))
        if settings.get("chat_template") == "qwen2":
            tokenizer.chat_template = _QWEN2_TEMPLATE
        if tokenizer.chat_template is not None:
            tokenizer.chat_template = _FLATTEN_PARTS + tokenizer.chat_template
        return tokenizer


class VilaProcessor:
    """Stands in for a processor's class."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> SimpleNamespace:
        """What SGLang asks of a processor: a tokenizer and an image processor.

        Frames are resized by PIL, as in the reference: torchvision's result differs by up to a step
        of the 256.
        """
        from transformers import SiglipImageProcessorPil

        where = _where(kwargs)
        return SimpleNamespace(
            tokenizer=VilaTokenizer.from_pretrained(path, **where),
            image_processor=SiglipImageProcessorPil.from_pretrained(
                path, subfolder=_TOWER, **where
            ),
        )


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ("revision", "cache_dir") if name in kwargs}


def register() -> None:
    """Teach transformers and SGLang to read the checkpoints; in every process of a server.

    SGLang's own way in is environment variables (``SGLANG_EXTERNAL_MM_MODEL_ARCH``, …), which hold
    one value each. What SGLang does with them is done here, so that they stay free.
    """
    from sglang.srt.configs.model_config import multimodal_model_archs
    from sglang.srt.multimodal.customized_mm_processor_utils import register_customized_processor
    from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY

    AutoConfig.register(MODEL_TYPE, VilaConfig, exist_ok=True)
    AutoTokenizer.register(VilaConfig, VilaTokenizer, exist_ok=True)
    _CONFIG_REGISTRY.setdefault(MODEL_TYPE, VilaConfig)
    register_customized_processor(VilaProcessor)(VilaConfig)
    if ARCHITECTURE not in multimodal_model_archs:
        multimodal_model_archs.append(ARCHITECTURE)
