"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the video as qwen-vl-utils gives it, and wishes of each video.

SGLang's own processor differs from that; the package's docstring says how. Here, frames are sampled
and resized before SGLang's code sees the video, which leaves such a video alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.multimodal.processors import qwen_vl as upstream
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.families.processor import VideoProcessor
from pevlm_sglang.families.qwen_vl import VIDEO
from pevlm_sglang.families.qwen_vl.sizes import QwenGeometry
from pevlm_sglang.families.qwen_vl.timestamps import label_items
from pevlm_sglang.families.qwen_vl.upstream_video import is_the_references, sampled_upstream
from pevlm_sglang.families.qwen_vl.video import sample_and_resize
from pevlm_sglang.media.wishes import Wishes

_METADATA = "pevlm_video_metadata"
_TOTAL_PIXELS = "VIDEO_MAX_PIXELS"  # environment variable that SGLang reads


class QwenVLProcessor(VideoProcessor, upstream.QwenVLImageProcessor):
    """See the module."""

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self._steps_aside = is_the_references(self.geometry)

    @staticmethod
    def geometry_of(hf_config: Any) -> QwenGeometry:
        vision = hf_config.vision_config
        sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        return QwenGeometry(hf_config.model_type, *sizes)

    @staticmethod
    def settings_of(video_config: Mapping[str, Any]) -> Mapping[str, Any]:
        if _TOTAL_PIXELS not in os.environ:
            return video_config
        return {"total_pixels": int(float(os.environ[_TOTAL_PIXELS])), **video_config}

    async def load_mm_data(self, *args: Any, video_data: Any = None, **kwargs: Any) -> Any:
        """Load the media of a request, and sample and resize its videos.

        Raises:
            ValueError: a bad wish of the request, or a video that cannot be sampled (HTTP 400).
        """
        sources, wishes = self.wishes(video_data)
        asked = any(wish.given() for wish in wishes)
        loaded = await super().load_mm_data(*args, video_data=sources or None, **kwargs)
        encoded = [isinstance(video, VideoDecoderWrapper) for video in loaded.videos or ()]
        if asked and not all(encoded):
            raise ValueError("fps, max_frames, max_pixels: expected an encoded video, got frames")
        if any(encoded) and not all(encoded):
            raise ValueError("videos: expected all of them encoded or none, got some of each")
        if any(encoded):
            # SGLang drops videos without a placeholder, which come last.
            pairs = zip(loaded.videos, wishes, strict=False)
            prepared = [await self._prepare(video, wish) for video, wish in pairs]
            loaded.videos = [frames for frames, _ in prepared]
            setattr(loaded, _METADATA, [metadata for _, metadata in prepared])
        return loaded

    async def _prepare(self, video: Any, wish: Wishes) -> tuple[torch.Tensor, dict[str, Any]]:
        """Frames ``[T, 3, H, W]`` uint8 of a video, and their metadata for the processor."""
        settings = self.geometry.settings(with_wishes(self.settings.given(), wish))
        if self._steps_aside:
            return await sampled_upstream(video, self.geometry, settings.given())
        work = self.io_executor.submit(sample_and_resize, video, self.geometry, settings)
        return await asyncio.wrap_future(work)

    async def process_and_combine_mm_data_async(
        self, base_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Hand over the reference's metadata, without a second resize; and leave the steps of a
        video with timestamps on its item."""
        if (metadata := getattr(base_output, _METADATA, None)) is not None:
            kwargs |= {"video_metadata": metadata, "do_sample_frames": False}
            kwargs["processor_video_config"] = {"do_resize": False}
        items, ids, output = await super().process_and_combine_mm_data_async(
            base_output, *args, **kwargs
        )
        if self.geometry.has_timestamps:
            label_items(items, ids.flatten().tolist(), self._tokenizer)
        return items, ids, output


def needless_corrections(hf_config: Any) -> tuple[str, ...]:
    """See :class:`~pevlm_sglang.families.family.Family`."""
    return VIDEO if is_the_references(QwenVLProcessor.geometry_of(hf_config)) else ()


def with_wishes(values: Mapping[str, Any], wish: Wishes) -> dict[str, Any]:
    """The server's video settings for one video. A rate takes the place of the server's
    ``nframes``, and ``max_frames`` bounds it too."""
    mixed = {**values, **wish.given()}
    if wish.fps is not None:
        mixed.pop("nframes", None)
    elif wish.max_frames is not None and "nframes" in mixed:
        mixed["nframes"] = min(mixed["nframes"], wish.max_frames)
    return mixed
