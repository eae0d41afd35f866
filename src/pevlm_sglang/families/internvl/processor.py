"""InternVL3.5's processor: the frames that the model was trained on, as many as asked for.

SGLang samples 32 frames of every video and mixes up placeholders where a video precedes an image;
see ``tiles.py`` for how else it differs from the reference.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.internvl import InternVLProcessor
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.families.internvl.sizes import InternVLGeometry, label
from pevlm_sglang.families.internvl.spans import CLOSING
from pevlm_sglang.families.internvl.tiles import tiles_of
from pevlm_sglang.families.processor import VideoProcessor
from pevlm_sglang.families.spans import label_tokens, leave_labels, mark_continuing
from pevlm_sglang.families.tile_layout import num_tiles
from pevlm_sglang.media import limits, told
from pevlm_sglang.media.cache import Clips
from pevlm_sglang.media.clips import whole
from pevlm_sglang.media.identity import identity
from pevlm_sglang.media.slices import all_of
from pevlm_sglang.media.stages import stage
from pevlm_sglang.media.wishes import Wishes

logger = logging.getLogger(__name__)


class _Tiles(NamedTuple):
    """An image or a video: a run of placeholders a step.

    Attributes:
        clips: of pixels ``[steps x tiles of each, 3, size, size]``.
    """

    clips: Clips

    @property
    def runs(self) -> int:
        return sum(clip.steps for clip in self.clips)

    @property
    def per_run(self) -> int:
        return len(self.clips[0].pixels) // self.clips[0].steps


class PevlmInternVLProcessor(VideoProcessor, InternVLProcessor):
    """In place of SGLang's on a server with PEVLM."""

    read_elsewhere = ("max_dynamic_patch",)

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self._size = int(hf_config.force_image_size or hf_config.vision_config.image_size)

    @staticmethod
    def geometry_of(hf_config: Any) -> InternVLGeometry:
        return InternVLGeometry()  # for its sampling alone

    async def process_qwen_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        """Text with ``<image>`` and ``<video>`` → tokens and tiles.

        Raises:
            ValueError: HTTP 400.
        """
        videos, wishes = self.wishes(getattr(request_obj, "video_data", None))
        with stage("fetch"):
            media = await self.load_mm_data(
                prompt=self._with_placeholders(input_text or "", image_data or (), videos),
                image_data=image_data,
                video_data=videos,
                multimodal_tokens=self.mm_tokens,
                discard_alpha_channel=True,
            )
        most_of = {kind: self.most_tiles(request_obj, kind) for kind in ("image", "video")}
        image_tiles = sum(
            num_tiles(image.width, image.height, self._size, most_of["image"])
            for image in media.images
        )
        self.check_length(image_tiles * self.num_image_token)
        heeded = list(map(self.heeded, media.videos, wishes))
        counts = self._counts(media, heeded, image_tiles, most_of["video"])
        limits.limits.check_pixels(zip(counts, media.videos, strict=True), media.images)
        images = await all_of(
            self.reader.run(self._image, picture, most_of["image"]) for picture in media.images
        )
        sampled = await all_of(
            self._sample(video, count, wish, most_of["video"])
            for video, count, wish in zip(media.videos, counts, heeded, strict=True)
        )
        ids, items = await self.reader.run(self._prompt, media.input_text, images, sampled)
        return MultimodalProcessorOutput(
            input_ids=ids,
            mm_items=items,
            im_start_id=self.img_start_token_id,
            im_end_id=self.img_end_token_id,
            im_token_id=self.img_context_token_id,
            video_token_id=self.video_token_id,
        )

    async def _process_special_format(
        self, image_data: Any, video_data: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """SGLang's way for what is processed already: images alone.

        Raises:
            ValueError: a video.
        """
        self.wishes(video_data)
        return await super()._process_special_format(image_data, video_data, *args, **kwargs)

    # --- Media ------------------------------------------------------------------------------

    def most_tiles(self, request: Any, kind: str) -> int:
        """Tiles of a picture at most: the request's, or one a frame and twelve an image."""
        default = self.IMAGE_MAX_NUM if kind == "image" else self.VIDEO_MAX_NUM
        held = int(self.max_context_len) // self.num_image_token
        return told.most_tiles(request, kind, default, max(default, held))

    def _tiles(self, picture: Image.Image, most: int) -> torch.Tensor:
        return tiles_of(picture, self._size, most).to(self._dtype)

    def _image(self, picture: Image.Image, most: int) -> _Tiles:
        return _Tiles((whole(self._tiles(picture.convert("RGB"), most)),))

    async def _sample(self, video: Any, count: int, wish: Wishes, most: int) -> _Tiles:
        """The tiles of each of ``count`` frames."""
        settings = dataclasses.replace(self.settings, num_frames=count)
        indices = self.indices(video, settings, wish)
        tiles = partial(self._tiles, most=most)
        return _Tiles(await self.sampled(video, indices, tiles, most))

    def _counts(
        self, media: Any, wishes: Sequence[Wishes], image_tiles: int, most_tiles: int
    ) -> list[int]:
        """Frames of each video: what was asked for, or a default that the context holds.

        Raises:
            ValueError: a wish that the context does not hold.
        """
        if not media.videos:
            return []
        tiles = 1
        for video in media.videos:
            if not isinstance(video, VideoDecoderWrapper) or not len(video):
                raise ValueError("video: expected a file with at least one frame, got none")
            height, width = video.frame_shape
            tiles = max(tiles, num_tiles(width, height, self._size, most_tiles))
        wrapping = label(self.settings.num_frames)
        wrapping += self.IMG_START + self.IMG_END + "\n"
        frame = tiles * self.num_image_token + self._token_len(wrapping)
        taken = self._token_len(media.input_text) + self.CONTEXT_RESERVED
        taken += image_tiles * self.num_image_token
        most = max(0, int(self.max_context_len) - taken) // frame
        default = self.settings.num_frames
        asked = [wish.max_frames for wish in wishes]
        counts = share(asked, default, most)
        if min(counts) < default and None in asked:
            logger.warning(
                f"PEVLM: {counts} frames of {len(counts)} videos in place of {default} each: the "
                f"context of {self.max_context_len} tokens holds {most}"
            )
        return counts

    # --- The prompt -------------------------------------------------------------------------

    def _with_placeholders(self, prompt: str, images: Sequence[Any], videos: Sequence[Any]) -> str:
        """The prompt, with a placeholder for each image and video."""
        # The chat template writes <IMG_CONTEXT>. SGLang would add <image> to it, and leave a
        # placeholder of its own behind in the text.
        prompt = prompt.replace(self.IMG_CONTEXT, self.IMAGE_PLACEHOLDER_TOKEN)
        for placeholder, media in (
            (self.IMAGE_PLACEHOLDER_TOKEN, images),
            (self.VIDEO_PLACEHOLDER_TOKEN, videos),
        ):
            if media:
                prompt = self._ensure_placeholders_before_assistant(prompt, placeholder, len(media))
        return prompt

    def _prompt(
        self, text: str, images: Sequence[_Tiles], videos: Sequence[_Tiles]
    ) -> tuple[list[int], list[MultimodalDataItem]]:
        """The expanded text's tokens, and an item an image or video."""
        with stage("process"):
            expanded = self._expanded(text, images, videos)
            ids = self.tokenizer(expanded, return_tensors="pt")["input_ids"].flatten()
        items = [
            *self._items(Modality.IMAGE, ids, images),
            *self._items(Modality.VIDEO, ids, videos),
        ]
        return ids.tolist(), items

    def _expanded(self, text: str, images: Sequence[_Tiles], videos: Sequence[_Tiles]) -> str:
        """The text with each placeholder written out, as it is tokenized."""
        pictures = (self._wrapped(self.IMG_CONTEXT, image) for image in images)
        clips = (
            "".join(
                f"{label(number)}{self._wrapped(self.VIDEO_CONTEXT_TOKEN, video)}\n"
                for number in range(1, video.runs + 1)
            )
            for video in videos
        )
        written = {
            self.IMAGE_PLACEHOLDER_TOKEN: pictures,
            self.IMG_CONTEXT: pictures,
            self.VIDEO_PLACEHOLDER_TOKEN: clips,
        }
        placeholders = "|".join(map(re.escape, written))
        return re.sub(placeholders, lambda found: next(written[found[0]], found[0]), text)

    def _wrapped(self, token: str, tiles: _Tiles) -> str:
        return self.IMG_START + token * (self.num_image_token * tiles.per_run) + self.IMG_END

    # --- Items ------------------------------------------------------------------------------

    def _items(
        self, kind: Modality, ids: torch.Tensor, media: Sequence[_Tiles]
    ) -> Iterator[MultimodalDataItem]:
        """An item an image or video, so that each is known to the prefix cache by itself."""
        token, token_id = {
            Modality.IMAGE: (self.IMG_CONTEXT, self.img_context_token_id),
            Modality.VIDEO: (self.VIDEO_CONTEXT_TOKEN, self.video_token_id),
        }[kind]
        offsets = self.get_mm_items_offset(ids, token_id)
        if len(offsets) != (expected := sum(medium.runs for medium in media)):
            raise ValueError(
                f"prompt: expected {token} only where an image or a video stands ({expected}), "
                f"got {len(offsets)}; leave it out of the text"
            )
        rest = iter(offsets)
        for medium in media:
            end = None
            for clip in medium.clips:
                own = list(islice(rest, clip.steps))
                shape = (clip.pixels.dtype, tuple(clip.pixels.shape), clip.steps)
                item = MultimodalDataItem(
                    feature=clip.pixels,
                    modality=kind,
                    offsets=own,
                    hash=identity(kind.name, *shape, clip.digest),
                )
                if kind is Modality.VIDEO:
                    if end is None:
                        before, first = ids[: own[0][0] - 1].tolist(), label(1)
                        tokens = label_tokens(self.tokenizer, before, re.escape(first), repr(first))
                    else:
                        tokens = own[0][0] - 1 - (end + 1 + CLOSING)
                        mark_continuing(item)
                    leave_labels(item, [(clip.steps, tokens)])
                    end = own[-1][1]
                yield item


def share(wishes: Sequence[int | None], default: int, most: int) -> list[int]:
    """How many frames each video of a prompt gets.

    Args:
        wishes: of the request, a number a video; None = the default.
        default: of the server. It shrinks, alike for all videos that take it, where the context
            does not hold as much; a wish does not.
        most: frames that the context holds.

    Raises:
        ValueError: the context does not hold the wishes, and a frame of every other video.
    """
    asked = sum(wish for wish in wishes if wish is not None)
    others = sum(wish is None for wish in wishes)
    if asked + others > max(most, len(wishes)):
        raise ValueError(
            f"max_frames: expected at most {most} frames in all, what the context holds beside "
            f"the text, got {asked} for {len(wishes) - others} of {len(wishes)} videos"
        )
    shared = min(default, max(1, (most - asked) // others)) if others else default
    return [shared if wish is None else wish for wish in wishes]
