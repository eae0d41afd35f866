"""NVILA's processor, mended: SGLang's own fails on every video.

It calls ``asnumpy()``, of another decoder's frames, on the arrays that its decoder gives, one frame
of the whole video after the other (sglang/srt/multimodal/processors/nvila.py, line 65). The frames
are sampled here instead, by the rule of NVILA's own processor, which is then told to keep them all.
Source: ``_load_video`` in ``llava/utils/media.py`` of github.com/NVlabs/VILA.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput
from sglang.srt.multimodal.processors.nvila import NUM_VIDEO_FRAMES, NVILAMultimodalProcessor

from pevlm_sglang.families.frame_knobs import KNOBS, FrameKnobs
from pevlm_sglang.processors.longvila import frame_indices
from pevlm_sglang.processors.sampling import Sampling, split
from pevlm_sglang.processors.video_file import frames_of, length_and_rate


class NvilaProcessor(NVILAMultimodalProcessor):
    """In place of SGLang's."""

    video_preprocessing_device = "cpu"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang's class reads none of these, and an unknown one must not end its server.
        given = {name: self.video_config[name] for name in KNOBS if name in self.video_config}
        frames = given.get("num_frames", NUM_VIDEO_FRAMES)
        most = given.get("max_frames", max(frames, FrameKnobs.max_frames))
        self._knobs = FrameKnobs.of(
            {**given, "num_frames": min(frames, most), "max_frames": most},
            default=NUM_VIDEO_FRAMES,
        )

    async def process_mm_data_async(
        self,
        image_data: Any,
        audio_data: Any,
        input_text: Any,
        request_obj: Any,
        **kwargs: Any,
    ) -> MultimodalProcessorOutput:
        """As SGLang's own, with sampled frames of each video.

        Raises:
            ValueError: media that cannot be read, or a wish beyond the server's limits.
        """
        sources, wishes = split(request_obj.video_data)
        for wish in wishes:
            wish.check(self._knobs.limits())
        media = await self.load_mm_data(
            prompt=input_text,
            multimodal_tokens=self.mm_tokens,
            image_data=request_obj.image_data,
            video_data=sources or None,
        )
        media.videos = [
            await asyncio.to_thread(self._frames, video, wish)
            for video, wish in zip(media.videos, wishes, strict=True)
        ]
        items, input_ids, _ = await self.process_and_combine_mm_data_async(
            media, self.mm_tokens, do_sample_frames=False
        )
        return MultimodalProcessorOutput(
            input_ids=input_ids.tolist(),
            mm_items=items,
            im_token_id=self.mm_tokens.image_token_id,
            video_token_id=self.mm_tokens.video_token_id,
        )

    def _frames(self, video: Any, wish: Sampling) -> list[Any]:
        """``[height, width, 3]`` uint8 arrays of a video's sampled frames."""
        indices = frame_indices(
            *length_and_rate(video),
            most=wish.max_frames or self._knobs.num_frames,
            fps=wish.fps or self._knobs.fps,
        )
        return list(frames_of(video, indices.tolist()))
