"""LongVILA's processor: frames by the reference's rule, 196 tokens and a newline each.

Source: github.com/NVlabs/VILA. ``llava/utils/media.py`` samples ``num_video_frames`` frames evenly,
the last one among them, and repeats frames of a shorter video; ``llava/model/encoders`` puts a
newline after each frame and image. A rate (``fps``) gets the rule of the training loader
(``llava/mm_utils.py``, ``get_frame_from_vcap_with_fps``): that rate, or fewer frames over the whole
video where that would be too many. At inference the reference takes the first of them and drops the
rest of the video, which nobody can mean.
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

from pevlm_sglang.families.frame_counts import FrameSettings
from pevlm_sglang.families.longvila.checkpoint import IMAGE_TOKEN, VIDEO_TOKEN
from pevlm_sglang.families.longvila.sizes import frames_at_rate
from pevlm_sglang.families.tile_layout import tile_layout
from pevlm_sglang.media.sources import SafeSources
from pevlm_sglang.media.tower_dtype import tower_dtype
from pevlm_sglang.media.video_file import frames_of, length_and_rate
from pevlm_sglang.media.wishes import Wishes, split

_PLACEHOLDERS = {Modality.IMAGE: IMAGE_TOKEN, Modality.VIDEO: VIDEO_TOKEN}


class LongVilaProcessor(SafeSources, BaseMultimodalProcessor):
    """Turns ``<image>`` and ``<vila/video>`` of a prompt into frames."""

    models: list[type] = []  # noqa: RUF012 (found by architecture, see families/registry.py)
    gpu_image_decode = False  # PIL images
    video_preprocessing_device = "cpu"
    supports_mm_processor_concurrency = False
    auto_mm_processor_worker_num = 1

    def __init__(self, hf_config: Any, server_args: Any, processor: Any, *args: Any, **kw: Any):
        super().__init__(hf_config, server_args, processor, *args, **kw)
        self._ids = {
            kind: processor.tokenizer.convert_tokens_to_ids(token)
            for kind, token in _PLACEHOLDERS.items()
        }
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=IMAGE_TOKEN,
            image_token_id=self._ids[Modality.IMAGE],
            video_token=VIDEO_TOKEN,
            video_token_id=self._ids[Modality.VIDEO],
        ).build(processor)
        self._settings = FrameSettings.of(self.video_config, default=hf_config.num_video_frames)
        self._dtype = tower_dtype(hf_config)

    @classmethod
    def check_launch(cls, hf_config: Any, video_config: Mapping[str, Any]) -> None:
        """Refuse bad video settings of a server.

        Raises:
            ValueError: an unknown name, or a bad value.
        """
        FrameSettings.of(video_config, default=hf_config.num_video_frames)

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
            wish.check(self._settings.limits())
        images = list(image_data or ())
        if any(self._is_preprocessed_input(item) for item in (*images, *sources)):
            raise ValueError("image, video: expected a file, URL or bytes, got processed features")
        loaded = await self.fast_load_mm_data(
            prompt="",
            multimodal_tokens=self.mm_tokens,
            image_data=images,
            video_data=sources,
        )
        return await asyncio.get_running_loop().run_in_executor(
            self.io_executor, self._process, input_text, loaded.images, loaded.videos, wishes
        )

    def _process(
        self,
        prompt: str | list[int],
        images: Sequence[Image.Image],
        videos: Sequence[Any],
        wishes: Sequence[Wishes],
    ) -> MultimodalProcessorOutput:
        tiled = self._is_tiled(images, videos)
        ids = prompt if isinstance(prompt, list) else self._tokenizer(prompt).input_ids
        self._check_counts(ids, {Modality.IMAGE: len(images), Modality.VIDEO: len(videos)})
        pixels = {
            Modality.IMAGE: iter([self._pixels(self._tiles(i) if tiled else [i]) for i in images]),
            Modality.VIDEO: iter(
                [self._video(video, wish) for video, wish in zip(videos, wishes, strict=True)]
            ),
        }
        kinds = {token: kind for kind, token in self._ids.items()}
        items: list[MultimodalDataItem] = []
        expanded: list[int] = []
        for token in ids:
            if (kind := kinds.get(token)) is None:
                expanded.append(token)
            else:
                items.append(self._item(kind, next(pixels[kind]), expanded, tiled=tiled))
        return MultimodalProcessorOutput(
            input_ids=expanded,
            mm_items=self._finalize_mm_items(items, images=None),
            im_token_id=self._ids[Modality.IMAGE],
            video_token_id=self._ids[Modality.VIDEO],
        )

    def _item(
        self, kind: Modality, pixels: torch.Tensor, prompt: list[int], *, tiled: bool
    ) -> MultimodalDataItem:
        """An image or video, whose tokens are appended to the prompt."""
        text = self.hf_config.frame_text(kind.name.lower())
        before, after = self._text_ids(text.before), self._text_ids(text.after)
        if tiled:
            after = after + self._text_ids("\n")  # what the reference writes between tiles
        tokens = self.hf_config.tokens_per_frame
        offsets = []
        for _ in pixels:
            prompt += before
            offsets.append((len(prompt), len(prompt) + tokens - 1))
            prompt += [self._ids[kind]] * tokens + after
        return MultimodalDataItem(
            modality=kind,
            feature=pixels,
            offsets=offsets,
            model_specific_data={"text_before": before, "text_after": after},
        )

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids if text else []
        return ids

    def _check_counts(self, ids: Sequence[int], expected: Mapping[Modality, int]) -> None:
        for kind, count in expected.items():
            found = sum(token == self._ids[kind] for token in ids)
            if found != count:
                raise ValueError(
                    f"prompt: expected {count} of {_PLACEHOLDERS[kind]}, one for each "
                    f"{kind.name.lower()}, got {found}"
                )

    # --- Pixels ---------------------------------------------------------------------------------

    def _video(self, video: Any, wish: Wishes) -> torch.Tensor:
        """``[frames, 3, size, size]`` pixels of a video's sampled frames."""
        indices = frame_indices(
            *length_and_rate(video),
            most=wish.max_frames or self._settings.num_frames,
            fps=wish.fps or self._settings.fps,
        )
        distinct, which = np.unique(indices, return_inverse=True)
        frames = frames_of(video, distinct.tolist())
        pixels = torch.cat([self._pixels([Image.fromarray(frame)]) for frame in frames])
        return pixels[torch.from_numpy(which)]

    def _pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels: torch.Tensor = self._processor.image_processor(
            list(images), return_tensors="pt"
        ).pixel_values
        return pixels.to(self._dtype)

    def _is_tiled(self, images: Sequence[Any], videos: Sequence[Any]) -> bool:
        """Whether an image is cut in tiles: the only picture of a prompt is, where the checkpoint
        was trained so (``generate_content`` in ``llava/model/llava_arch.py``)."""
        dynamic = getattr(self.hf_config, "image_aspect_ratio", None) == "dynamic"
        return dynamic and len(images) == 1 and not videos

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        """Squares of the image at the nearest aspect ratio, and the whole of it
        (``dynamic_preprocess`` in ``llava/mm_utils.py``)."""
        size = self.hf_config.frame_size
        least = int(getattr(self.hf_config, "min_tiles", None) or 1)
        most = int(getattr(self.hf_config, "max_tiles", None) or 12)
        columns, rows = tile_layout(*image.size, size, most, least=least)
        large = image.resize((size * columns, size * rows))
        tiles = [
            large.crop((x, y, x + size, y + size))
            for y in range(0, size * rows, size)
            for x in range(0, size * columns, size)
        ]
        return tiles if len(tiles) == 1 else [*tiles, image.resize((size, size))]


def frame_indices(total: int, video_fps: float, *, most: int, fps: float | None) -> np.ndarray:
    """Which frames of a video are sampled.

    Args:
        total: frames of the video.
        video_fps: frames a second of the video.
        most: frames to sample; where ``fps`` is given, at most.
        fps: frames to sample from a second.

    Returns:
        ``[sampled frames]`` ascending; frames repeat where a rate is not given and ``most`` is more
        than there are.
    """
    if fps is None:
        return np.round(np.linspace(0, total - 1, most)).astype(int)
    return np.linspace(0, total - 1, frames_at_rate(total, video_fps, fps, most), dtype=int)
