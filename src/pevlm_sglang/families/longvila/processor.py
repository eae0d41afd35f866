"""LongVILA's processor: frames by the reference's rule, 196 tokens and a newline each.

Source: github.com/NVlabs/VILA, ``llava/model/encoders``, which puts a newline after each frame and
image; ``sizes.py`` beside this file says which frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality

from pevlm_sglang.families.longvila.checkpoint import IMAGE_TOKEN, VIDEO_TOKEN
from pevlm_sglang.families.longvila.sizes import LongVilaGeometry
from pevlm_sglang.families.placeholder_processor import Medium, PlaceholderProcessor
from pevlm_sglang.families.tile_layout import cut
from pevlm_sglang.media.cache import Clips
from pevlm_sglang.media.clips import whole


class LongVilaProcessor(PlaceholderProcessor):
    """Turns ``<image>`` and ``<vila/video>`` of a prompt into frames."""

    placeholders = {Modality.IMAGE: IMAGE_TOKEN, Modality.VIDEO: VIDEO_TOKEN}  # noqa: RUF012
    supports_mm_processor_concurrency = False
    auto_mm_processor_worker_num = 1

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self.token_ids = {
            kind: self._tokenizer.convert_tokens_to_ids(token)
            for kind, token in self.placeholders.items()
        }

    @staticmethod
    def geometry_of(hf_config: Any) -> LongVilaGeometry:
        geometry: LongVilaGeometry = hf_config.geometry
        return geometry

    def video_tokens(self, frames: int) -> int:
        return frames * self.geometry.tokens_per_frame

    async def video(self, video: Any, indices: Sequence[int]) -> Medium:
        clips = await self.sampled(video, indices, lambda frame: self._pixels([frame])[0])
        return self._medium(Modality.VIDEO, clips)

    def image(self, image: Image.Image, kind: str, *, alone: bool) -> Medium:
        """See the base. The only picture of a prompt is cut in tiles, where the checkpoint was
        trained so (``generate_content`` in ``llava/model/llava_arch.py``)."""
        tiled = alone and getattr(self.hf_config, "image_aspect_ratio", None) == "dynamic"
        pixels = self._pixels(self._tiles(image) if tiled else [image])
        # What the reference writes between tiles.
        return self._medium(Modality.IMAGE, (whole(pixels),), more="\n" if tiled else "")

    def _medium(self, kind: Modality, clips: Clips, more: str = "") -> Medium:
        before, after, more_ids = (
            self._tokenizer(text).input_ids if text else []
            for text in (*self.hf_config.frame_text(kind.name.lower()), more)
        )
        after = after + more_ids
        return Medium(
            kind,
            clips,
            self.geometry.tokens_per_frame,
            runs=sum(len(clip.pixels) for clip in clips),
            before=before,
            after=after,
            data={"text_before": before, "text_after": after},
        )

    def _pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """``[images, 3, size, size]``"""
        output = self._processor.image_processor(list(images), return_tensors="pt")
        pixels: torch.Tensor = output.pixel_values.to(self._dtype)
        return pixels

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        """Squares of the image at the nearest aspect ratio, and the whole of it
        (``dynamic_preprocess`` in ``llava/mm_utils.py``)."""
        least = int(getattr(self.hf_config, "min_tiles", None) or 1)
        most = int(getattr(self.hf_config, "max_tiles", None) or 12)
        return cut(image, self.geometry.image_size, most, least=least)
