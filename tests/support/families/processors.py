"""A small processor of each family as a server with PEVLM has it, without a server or weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.families import internvl_model, internvl_upstream, llava_video_tiny, longvila
from support.processor import Processor, sglang_processor
from support.tiny import make_tiny_model


@dataclass(frozen=True)
class FamilyProcessor:
    """How to build one.

    Attributes:
        prompt: with a placeholder for a video.
        settings: the ``video`` section of ``--mm-process-config``, for a file of six frames, two a
            second.
        build: a context manager, from a directory to write in and that section.
        sampled: which of those frames are.
    """

    prompt: str
    settings: Mapping[str, Any]
    build: Callable[[Path, Mapping[str, Any]], Any]
    sampled: Sequence[int] = range(6)


@contextmanager
def _qwen(name: str, directory: Path, video: Mapping[str, Any]) -> Iterator[Processor]:
    import transformers
    from sglang.srt.utils.hf_transformers.processor import get_processor

    from pevlm_sglang.families.qwen_vl.processor import QwenVLProcessor

    older = "qwen2_5_vl" if name == "qwen3_vl" else name
    path = directory / older
    if not path.exists():
        make_tiny_model(path, architecture=older, num_layers=1, vision_depth=1)
    config, processor = transformers.AutoConfig.from_pretrained(path), get_processor(str(path))
    if name == "qwen3_vl":
        tokens = ("image_token_id", "video_token_id", "vision_start_token_id")
        ids = {token: getattr(config, token) for token in (*tokens, "vision_end_token_id")}
        config = transformers.Qwen3VLConfig(
            architectures=["Qwen3VLForConditionalGeneration"], **ids
        )
        processor = transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(patch_size=16),
            processor.tokenizer,
            transformers.Qwen3VLVideoProcessor(),
        )
    options = {"min_pixels": 3136, **video}
    with sglang_processor(QwenVLProcessor, config, processor, video=options) as built:
        yield built


@contextmanager
def _internvl(directory: Path, video: Mapping[str, Any]) -> Iterator[Processor]:
    path = internvl_model.make_tiny_model(directory / "internvl")
    with internvl_upstream.processor(path, video=video) as built:
        yield built


@contextmanager
def _llava_video(directory: Path, video: Mapping[str, Any]) -> Iterator[Processor]:
    from sglang.srt.utils.hf_transformers_utils import get_processor
    from transformers import AutoConfig

    from pevlm_sglang.families.llava_video.checkpoint import load_processor
    from pevlm_sglang.families.llava_video.processor import LlavaVideoProcessor

    path = directory / "llava_video"
    if not path.exists():
        llava_video_tiny.make_tiny_model(path)
    processor = load_processor(get_processor, str(path), model_name=str(path))
    config = AutoConfig.from_pretrained(path)
    with sglang_processor(LlavaVideoProcessor, config, processor, video=video) as built:
        yield built


@contextmanager
def _longvila(directory: Path, video: Mapping[str, Any]) -> Iterator[Processor]:
    from sglang.srt.utils.hf_transformers_utils import get_config, get_processor

    from pevlm_sglang.families.longvila import checkpoint
    from pevlm_sglang.families.longvila.processor import LongVilaProcessor

    checkpoint.register()
    path = directory / "longvila"
    if not path.exists():
        longvila.make_tiny_model(path)
    processor = get_processor(str(path), model_name=str(path))
    config = get_config(str(path), trust_remote_code=False)
    with sglang_processor(LongVilaProcessor, config, processor, video=video) as built:
        yield built


def _qwen_family(name: str) -> FamilyProcessor:
    def build(directory: Path, video: Mapping[str, Any]) -> Any:
        return _qwen(name, directory, video)

    prompt = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n"
    return FamilyProcessor(prompt, {}, build)


_SIX = {"num_frames": 6}
_MIDDLES = (0, 1, 2, 2, 3, 4)  # of six segments from the first frame to the last

PROCESSORS = {
    "qwen2_vl": _qwen_family("qwen2_vl"),
    "qwen2_5_vl": _qwen_family("qwen2_5_vl"),
    "qwen3_vl": _qwen_family("qwen3_vl"),
    "internvl": FamilyProcessor("<video>What?", _SIX, _internvl, _MIDDLES),
    "llava_video": FamilyProcessor("<video>What?", _SIX, _llava_video),
    "longvila": FamilyProcessor(f"{longvila.VIDEO}What?", _SIX, _longvila),
}
"""By the family, and Qwen's by the model."""
