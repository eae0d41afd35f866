"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the video as qwen-vl-utils gives it, and wishes of each video.

SGLang's own processor differs from that; the package's docstring says how. Here, a video is in
patches before SGLang's code sees it, which leaves such a video alone.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors import qwen_vl as upstream

from pevlm_sglang.families.processor import VideoProcessor
from pevlm_sglang.families.qwen_vl import VIDEO
from pevlm_sglang.families.qwen_vl.patched_videos import (
    NUMBERS,
    PatchedVideoProcessor,
    PatchedVideos,
    clip_items,
    patched_videos,
)
from pevlm_sglang.families.qwen_vl.sizes import QwenGeometry
from pevlm_sglang.families.qwen_vl.timestamps import label_items
from pevlm_sglang.families.qwen_vl.upstream_video import is_the_references
from pevlm_sglang.families.qwen_vl.video import Patcher, Sampled, clip_buffer, normalization, sample
from pevlm_sglang.media import limits
from pevlm_sglang.media.cache import Clips
from pevlm_sglang.media.frame_arrays import FrameArrays
from pevlm_sglang.media.slices import all_of
from pevlm_sglang.media.stages import stage
from pevlm_sglang.media.wishes import Wishes

_TOTAL_PIXELS = "VIDEO_MAX_PIXELS"  # environment variable that SGLang reads


class QwenVLProcessor(VideoProcessor, upstream.QwenVLImageProcessor):
    """See the module."""

    def __init__(
        self, hf_config: Any, server_args: Any, processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        processor.video_processor = PatchedVideoProcessor(processor.video_processor)
        super().__init__(hf_config, server_args, processor, *args, **kwargs)
        self.ATTR_NAME_TO_MODALITY[NUMBERS] = Modality.VIDEO
        self._at_hand = threading.local()
        self._normalization = normalization(processor.video_processor)
        self._exact = self.config.video_resize == "float32"

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
        with stage("fetch"):
            loaded = await super().load_mm_data(*args, video_data=sources or None, **kwargs)
        # SGLang drops videos without a placeholder, which come last.
        videos = loaded.videos or []
        planned = list(map(self._planned, videos, wishes))
        frames = [len(one.indices) for one in planned]
        limits.limits.check_pixels(zip(frames, videos, strict=True), loaded.images or ())
        if videos:
            loaded.videos = (await self._patched(videos, planned)).stand_ins()
        return loaded

    def _planned(self, video: Any, wish: Wishes) -> Sampled:
        wish = self.heeded(video, wish)
        if isinstance(video, FrameArrays):  # all of them; one is shown twice, to fill a step
            wish = dataclasses.replace(wish, max_frames=None)
        settings = self.geometry.settings(with_wishes(self.settings.given(), wish))
        return sample(video, self.geometry, settings, wish)

    async def _patched(self, videos: Sequence[Any], planned: Sequence[Sampled]) -> PatchedVideos:
        """Resize and patchify the sampled frames of a prompt's videos."""
        grids = [one.grid(self.geometry) for one in planned]
        merged = self.geometry.merge_size**2
        self.check_length(sum(prod(grid) // merged for grid in grids))
        clips = await all_of(
            self.prepared(video, (*one.indices, one.size, self._exact), partial(self._read, one))
            for video, one in zip(videos, planned, strict=True)
        )
        return PatchedVideos(grids, [one.metadata for one in planned], clips)

    async def _read(self, sampled: Sampled, video: Any) -> Clips:
        """The patches of an open video."""
        device, room = self.pixel_device, self.cache.room
        if device is not None:
            room = partial(device.empty, otherwise=room)
        make = partial(clip_buffer, sampled, self.geometry, self._dtype, self.clip_steps, room)
        buffer = await self.reader.run(make)
        work = Patcher(
            buffer, sampled, self.geometry, self._normalization, exact=self._exact, device=device
        )
        per_step = self.geometry.frames_per_step
        await self.reader.read(video, sampled.indices, work, multiple=per_step)
        return buffer.clips()

    def process_and_combine_mm_data(
        self, base_output: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Hand over patches without the settings that they were made by; and leave the steps of a
        video with timestamps on its item."""
        if patched_videos(base_output.videos) is not None:
            kwargs |= {"processor_video_config": {}, "video_metadata": None}
        self._at_hand.videos = patched_videos(base_output.videos)
        try:
            items, ids, output = super().process_and_combine_mm_data(base_output, *args, **kwargs)
        finally:
            del self._at_hand.videos  # its pixels
        if self.geometry.has_timestamps:
            label_items(items, ids.flatten().tolist(), self._tokenizer)
        return items, ids, output

    def _postprocess_mm_items_before_transport(self, items: list[Any], **kwargs: Any) -> list[Any]:
        """An item a clip; and hash pictures here, in a thread of the launcher: SGLang does so in
        the scheduler's loop."""
        made = []
        for item in super()._postprocess_mm_items_before_transport(items, **kwargs):
            if (numbers := item.model_specific_data.pop(NUMBERS, None)) is None:
                made.append(item)
            else:
                clips = self._at_hand.videos.clips
                made += clip_items(item, [clips[number] for number in numbers.tolist()])
        for item in made:
            item.set_pad_value()
        return made


def needless_corrections(hf_config: Any) -> tuple[str, ...]:
    """See :class:`~pevlm_sglang.families.family.Family`."""
    return VIDEO if is_the_references(QwenVLProcessor.geometry_of(hf_config)) else ()


def with_wishes(values: Mapping[str, Any], wish: Wishes) -> dict[str, Any]:
    """The server's video settings for one video. A rate takes the place of the server's
    ``nframes``, and ``max_frames`` bounds it too."""
    mixed = {**values, **wish.numbers()}
    if wish.fps is not None:
        mixed.pop("nframes", None)
    elif wish.max_frames is not None and "nframes" in mixed:
        mixed["nframes"] = min(mixed["nframes"], wish.max_frames)
    return mixed
