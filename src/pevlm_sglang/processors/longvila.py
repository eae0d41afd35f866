"""LongVILA's processor: frames by the reference's rule, 196 tokens and a newline each.

Source: github.com/NVlabs/VILA. ``llava/utils/media.py`` samples ``num_video_frames`` frames evenly,
the last one among them, and repeats frames of a shorter video. ``llava/model/encoders`` puts a
newline after each frame, in the middle of the prompt where ``<vila/video>`` stood. A request that
asks for ``fps`` gets the rule of the training loader (``llava/mm_utils.py``,
``get_frame_from_vcap_with_fps``): that rate, or fewer frames over the whole video where that would
be too many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import (
    BaseMultimodalProcessor,
    MultimodalSpecialTokens,
)

from pevlm_sglang.checkpoints.vila import IMAGE_TOKEN, VIDEO_TOKEN
from pevlm_sglang.families.longvila import ARCHITECTURES
from pevlm_sglang.processors.sampling import Sampling, split

DECODED_AT_ONCE = 32  # frames of full size in memory


class LongVilaProcessor(BaseMultimodalProcessor):
    """Turns ``<image>`` and ``<vila/video>`` of a prompt into frames."""

    models: list[type] = []  # noqa: RUF012 (found by architecture, see processors/__init__.py)
    gpu_image_decode = False  # PIL images
    video_preprocessing_device = "cpu"
    supports_mm_processor_concurrency = False
    auto_mm_processor_worker_num = 1

    def __init__(self, hf_config: Any, server_args: Any, processor: Any, *args: Any, **kw: Any):
        super().__init__(hf_config, server_args, processor, *args, **kw)
        tokenizer = processor.tokenizer
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=IMAGE_TOKEN,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            video_token=VIDEO_TOKEN,
            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        ).build(processor)
        self.num_frames, self.max_frames = frame_limits(
            self.video_config, hf_config.num_video_frames
        )

    async def process_mm_data_async(
        self,
        image_data: list[Any] | None,
        audio_data: list[Any] | None,
        input_text: str | list[int],
        request_obj: Any,
        **kwargs: Any,
    ) -> MultimodalProcessorOutput:
        """Load and sample the media of a request, and lay out its prompt.

        Raises:
            ValueError: media that cannot be read, or that the prompt has no place for.
        """
        sources, wishes = split(request_obj.video_data)
        for wish in wishes:
            wish.check({"fps": float("inf"), "max_frames": self.max_frames})
        loaded = await self.fast_load_mm_data(
            prompt="",
            multimodal_tokens=self.mm_tokens,
            image_data=list(image_data or ()),
            video_data=sources,
        )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self.io_executor, self._process, input_text, loaded.images, loaded.videos, wishes
        )

    def _process(
        self,
        prompt: str | list[int],
        images: Sequence[Any],
        videos: Sequence[Any],
        wishes: Sequence[Sampling],
    ) -> MultimodalProcessorOutput:
        media = {
            Modality.IMAGE: iter([self._pixels([image]) for image in images]),
            Modality.VIDEO: iter(
                [self._video(video, wish) for video, wish in zip(videos, wishes, strict=True)]
            ),
        }
        ids = prompt if isinstance(prompt, list) else self._tokenizer(prompt).input_ids
        self._check_counts(ids, images=len(images), videos=len(videos))
        kinds = {
            self.mm_tokens.image_token_id: Modality.IMAGE,
            self.mm_tokens.video_token_id: Modality.VIDEO,
        }
        items: list[MultimodalDataItem] = []
        expanded: list[int] = []
        for token in ids:
            kind = kinds.get(token)
            if kind is None:
                expanded.append(token)
            else:
                items.append(self._item(kind, token, next(media[kind]), expanded))
        return MultimodalProcessorOutput(
            input_ids=expanded,
            mm_items=self._finalize_mm_items(items, images=None),
            im_token_id=self.mm_tokens.image_token_id,
            video_token_id=self.mm_tokens.video_token_id,
        )

    def _item(
        self, kind: Modality, token: int, pixels: torch.Tensor, prompt: list[int]
    ) -> MultimodalDataItem:
        """An image or video, whose tokens are appended to the prompt."""
        text = self.hf_config.frame_text(kind.name.lower())
        before, after = (
            self._tokenizer(t).input_ids if t else [] for t in (text.before, text.after)
        )
        tokens = self.hf_config.tokens_per_frame
        offsets = []
        for _ in pixels:
            prompt += before
            offsets.append((len(prompt), len(prompt) + tokens - 1))
            prompt += [token] * tokens + after
        return MultimodalDataItem(
            modality=kind,
            feature=pixels,
            offsets=offsets,
            model_specific_data={"text_before": before, "text_after": after},
        )

    def _check_counts(self, ids: Sequence[int], **expected: int) -> None:
        tokens = {"images": self.mm_tokens.image_token_id, "videos": self.mm_tokens.video_token_id}
        for name, count in expected.items():
            found = sum(token == tokens[name] for token in ids)
            if found != count:
                raise ValueError(f"prompt: expected {count} placeholders for {name}, got {found}")

    def _video(self, video: Any, wish: Sampling) -> torch.Tensor:
        """``[frames, 3, size, size]`` fp32 pixels of a video's sampled frames."""
        most = wish.max_frames or min(self.num_frames, self.max_frames)
        indices = frame_indices(len(video), video.avg_fps, most, wish.fps)
        distinct, which = np.unique(indices, return_inverse=True)
        pixels = [
            self._pixels(Image.fromarray(np.asarray(frame)) for frame in video.get_frames_at(part))
            for start in range(0, len(distinct), DECODED_AT_ONCE)
            if (part := distinct[start : start + DECODED_AT_ONCE].tolist())
        ]
        return torch.cat(pixels)[torch.from_numpy(which)]

    def _pixels(self, images: Any) -> torch.Tensor:
        pixels: torch.Tensor = self._processor.image_processor(
            list(images), return_tensors="pt"
        ).pixel_values
        return pixels


def frame_limits(knobs: Mapping[str, Any], published: int) -> tuple[int, int]:
    """Frames sampled by default and at most, of ``--mm-process-config '{"video": {…}}'``."""
    num_frames = int(knobs.get("num_frames", published))
    return num_frames, int(knobs.get("max_frames", max(768, num_frames)))


def frame_indices(total: int, video_fps: float, most: int, fps: float | None) -> np.ndarray:
    """Which frames of a video are sampled.

    Args:
        total: frames of the video.
        video_fps: frames a second of the video.
        most: frames to sample; where ``fps`` is given, at most.
        fps: frames to sample from a second.
    """
    if fps is None:
        return np.round(np.linspace(0, total - 1, most)).astype(int)
    wanted = total / video_fps * fps
    count = most if wanted >= most else max(int(wanted), 2)
    return np.linspace(0, total - 1, min(count, total), dtype=int)


__all__ = ["ARCHITECTURES", "LongVilaProcessor", "frame_indices", "frame_limits"]
