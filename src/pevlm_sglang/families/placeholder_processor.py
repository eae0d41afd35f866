"""A processor for families whose prompt is tokens between placeholders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)

from pevlm_sglang.families.processor import VideoProcessor
from pevlm_sglang.families.spans import mark_continuing
from pevlm_sglang.media import limits
from pevlm_sglang.media.cache import Clips
from pevlm_sglang.media.clips import Clip
from pevlm_sglang.media.identity import identity
from pevlm_sglang.media.slices import all_of
from pevlm_sglang.media.stages import stage


@dataclass(frozen=True)
class Medium:
    """A video, an image or a frame of a list, preprocessed.

    Attributes:
        clips: of a video; one of anything else.
        tokens: of each run of placeholders.
        runs: of placeholders; of a video one, or one a step.
        before, after: tokens of the text around each run.
        data: what the spans and the model have to know beside the pixels.
    """

    modality: Modality
    clips: Clips
    tokens: int
    runs: int = 1
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, clip: Clip, data: Mapping[str, Any]) -> int:
        """By which SGLang's caches know a clip. The same pixels may have other features as a frame
        and as a picture, so it is more than the pixels."""
        shape = tuple(clip.pixels.shape)
        return identity(clip.digest, self.modality.name, clip.pixels.dtype, shape, dict(data))


class PlaceholderProcessor(VideoProcessor):
    """Tokens of a prompt between placeholders, each of which becomes what its medium needs.

    Attributes:
        placeholders: what stands for an image or video in a text.
        token_ids: of the expanded placeholders.
    """

    gpu_image_decode = False  # PIL images, and frames decoded on the CPU, as in the references
    video_preprocessing_device = "cpu"
    placeholders: Mapping[Modality, str] = {Modality.IMAGE: "<image>", Modality.VIDEO: "<video>"}
    token_ids: Mapping[Modality, int]

    @abstractmethod
    def image(self, image: Image.Image, kind: str, *, alone: bool) -> Medium:
        """An image.

        Args:
            kind: ``image``, ``multi-images`` or ``video`` (a frame of one), as the request says.
            alone: whether it is the only picture of the prompt.
        """

    @abstractmethod
    async def video(self, video: Any, indices: Sequence[int]) -> Medium:
        """A video; see :meth:`sampled`."""

    @abstractmethod
    def video_tokens(self, frames: int) -> int:
        """Placeholders of a video."""

    def tokenize(
        self, prompt: str | Sequence[int], images: int, videos: int
    ) -> tuple[list[list[int]], list[Modality]]:
        """The tokens around the placeholders, one piece more than those, and their kinds."""
        ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        known = {token: kind for kind, token in self.token_ids.items()}
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token in known:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return pieces, [known[token] for token in ids if token in known]

    async def process_mm_data_async(
        self,
        image_data: Sequence[Any] | None,
        audio_data: Sequence[Any] | None = None,
        input_text: str | Sequence[int] = "",
        request_obj: Any = None,
        **kwargs: Any,
    ) -> MultimodalProcessorOutput:
        """Expand a request's placeholders, and preprocess what they stand for.

        Raises:
            ValueError: a medium that cannot be read, a wish that cannot be met, or placeholders
                that do not fit the media.
        """
        self.begin(request_obj, **kwargs)
        videos, wishes = self.wishes(request_obj.video_data)
        images = list(image_data or ())
        if any(isinstance(image, dict) for image in images):
            raise ValueError(
                "image_data: expected a file, URL or bytes, got a dict; features that "
                "are processed already are not taken"
            )
        pieces, order = self.tokenize(input_text, len(images), len(videos))
        for kind, given in ((Modality.IMAGE, images), (Modality.VIDEO, videos)):
            if order.count(kind) != len(given):
                raise ValueError(
                    f"prompt: expected {len(given)} of {self.placeholders[kind]}, one for each "
                    f"{kind.name.lower()}, got {order.count(kind)}"
                )
        with stage("fetch"):
            loaded = await self.fast_load_mm_data("", self.mm_tokens, images, videos)
        heeded = list(map(self.heeded, loaded.videos, wishes))
        sampled = [
            self.indices(video, self.settings.wished(wish), wish)
            for video, wish in zip(loaded.videos, heeded, strict=True)
        ]
        frames = list(map(len, sampled))
        self.check_length(sum(map(self.video_tokens, frames)))
        limits.limits.check_pixels(zip(frames, loaded.videos, strict=True), loaded.images)
        kinds = _image_kinds(getattr(request_obj, "modalities", None), len(images))
        alone = len(images) == 1 and not videos
        work: list[Coroutine[Any, Any, Medium]] = [
            self.reader.run(partial(self.image, image, kind, alone=alone))
            for image, kind in zip(loaded.images, kinds, strict=True)
        ]
        for video, indices in zip(loaded.videos, sampled, strict=True):
            work.append(self.video(video, indices))
        media = await all_of(work)
        rest = {
            Modality.IMAGE: iter(media[: len(images)]),
            Modality.VIDEO: iter(media[len(images) :]),
        }
        return self._expand(pieces, [(kind, next(rest[kind])) for kind in order])

    def _expand(
        self, pieces: Sequence[Sequence[int]], media: Sequence[tuple[Modality, Medium]]
    ) -> MultimodalProcessorOutput:
        ids = list(pieces[0])
        items: list[MultimodalDataItem] = []
        for (kind, medium), piece in zip(media, pieces[1:], strict=True):
            offsets = []
            for _ in range(medium.runs):
                ids += medium.before
                offsets.append((len(ids), len(ids) + medium.tokens - 1))  # inclusive at the end
                ids += [self.token_ids[kind]] * medium.tokens
                ids += medium.after
            ids += piece
            items += self._items(medium, offsets)
        return MultimodalProcessorOutput(
            input_ids=ids,
            mm_items=self._finalize_mm_items(items, images=None),
            im_token_id=self.token_ids[Modality.IMAGE],
            video_token_id=self.token_ids[Modality.VIDEO],
        )

    def _items(
        self, medium: Medium, offsets: Sequence[tuple[int, int]]
    ) -> Iterator[MultimodalDataItem]:
        """An item a clip."""
        start = 0
        for clip in medium.clips:
            end = start + clip.steps
            data, own = self.cut(medium, offsets, start, end)
            item = MultimodalDataItem(
                modality=medium.modality,
                hash=medium.identity(clip, data),
                feature=clip.pixels,
                offsets=list(own),
                model_specific_data=dict(data),
            )
            if start:
                mark_continuing(item)
            yield item
            start = end

    def cut(
        self, medium: Medium, offsets: Sequence[tuple[int, int]], start: int, end: int
    ) -> tuple[Mapping[str, Any], Sequence[tuple[int, int]]]:
        """Data and offsets of steps ``[start, end)`` of a video, or of all of anything else. Here a
        step has a run of its own."""
        return medium.data, offsets if len(medium.clips) == 1 else offsets[start:end]


def _image_kinds(modalities: Any, images: int) -> list[str]:
    """What the request says of each image: SGLang says it once an image in a chat, and once for all
    or not at all on ``/generate``."""
    given = [modalities] if isinstance(modalities, str) else list(modalities or ())
    if len(given) != images:
        given = (given[:1] or [None]) * images
    return [kind or "image" for kind in given]
