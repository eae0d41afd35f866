"""What a client gives as an image or a video. Its faults cost HTTP 400, and nothing else.

SGLang answers some of them with HTTP 500: a picture that Pillow takes for a decompression bomb, and
every path that cannot be read. And it reads an image from any path, a device or a pipe that never
ends among them.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.utils import CLIENT_MEDIA_EXCEPTIONS
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.media import limits
from pevlm_sglang.media.download import Downloaded, fetched
from pevlm_sglang.media.frame_arrays import frame_arrays
from pevlm_sglang.media.identity import file_stamp, remember_stamp
from pevlm_sglang.media.known import KnownVideo

_FEATURES = ("feature", "precomputed_embeddings", "pixel_values", "pixel_values_videos")
_EMBEDDINGS = ("precomputed_embedding", "PRECOMPUTED_EMBEDDING")
_MOST_MERGED = 64  # patches that become one feature
_PROBED = 1 << 20  # bytes that FFmpeg looks at
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<MPD", b"<CompositionPlaylist", b"c=IN IP")

_CLIENTS_FAULTS = (*CLIENT_MEDIA_EXCEPTIONS, Image.DecompressionBombError, OSError)


@contextmanager
def reading() -> Iterator[None]:
    """A block that reads a client's image or video.

    Raises:
        ValueError: what is wrong with it; also where SGLang has wrapped that in a RuntimeError.
    """
    try:
        yield
    except _CLIENTS_FAULTS as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error.__cause__, _CLIENTS_FAULTS):
            raise ValueError(str(error)) from error
        raise


def check_path(source: Any) -> None:
    """Refuse a path to what is no file.

    Args:
        source: an image, as SGLang takes it. It reads what starts like a path as one.

    Raises:
        ValueError: names it.
    """
    source = getattr(source, "url", source)
    if not isinstance(source, str) or not source.startswith(("/", "file://")):
        return
    path = unquote(urlparse(source).path) if source.startswith("file://") else source
    if not os.path.isfile(path):
        raise ValueError(f"image: expected a file, got {source[:100]}")


def check_processed(medium: Any) -> None:
    """Refuse an input that is said to be processed already and is none: JSON has no tensors, and
    the scheduler does not survive what has the place of one.

    Args:
        medium: an image or video, as SGLang takes it.

    Raises:
        ValueError: names what is wrong.
    """
    if not isinstance(medium, dict) or "format" not in medium:
        return
    features = {name: medium[name] for name in _FEATURES if name in medium}
    for name, value in features.items():
        if not isinstance(value, torch.Tensor | np.ndarray) or value.ndim < 2 or not len(value):
            raise ValueError(f"{name}: expected a tensor of features, got {reprlib.repr(value)}")
    if not features or (medium["format"] in _EMBEDDINGS and "feature" not in features):
        raise ValueError(
            f"image or video in the format {str(medium['format'])[:50]}: expected its features, "
            "got none"
        )
    rows = sum(len(value) for value in features.values())
    for name in ("image_grid_thw", "video_grid_thw"):
        if (grid := medium.get(name)) is None:
            continue
        try:
            sides = torch.as_tensor(grid, dtype=torch.float64).view(-1, 3)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            sides = torch.zeros(1, 3)
        # Its product is the length of what is made from it, whatever there is of features.
        total = float(sides.prod(1).sum())
        if not (sides >= 1).all() or not rows <= total <= _MOST_MERGED * rows:
            raise ValueError(
                f"{name}: expected the steps, rows and columns of {rows} features, "
                f"got {reprlib.repr(grid)}"
            )


def check_holds_frames(path: str) -> None:
    """Refuse a file that names others: FFmpeg would open those, in a folder that
    ``--pevlm-media-paths`` does not name, and whichever lies beside. (It opens nothing for what is
    read from memory.)

    Raises:
        ValueError: a playlist of HLS, DASH, IMF, FFmpeg's concat or SDP.

    Source: the demuxers' probes in FFmpeg, libavformat: each of these looks at the text before the
    first zero, behind tags as audio has, with which no video begins.
    """
    with open(path, "rb") as file:
        head = file.read(_PROBED).split(b"\0", 1)[0]
    if head.startswith(b"ID3") or any(mark in head for mark in _PLAYLISTS):
        raise ValueError(
            "video: expected a file that holds its frames, got a playlist or audio; send the file "
            "that it names"
        )


def _downloading(name: str) -> Callable[..., Any]:
    """SGLang's loader of this name, with what is on the web downloaded before."""

    async def load(
        self: Any,
        prompt: Any,
        multimodal_tokens: Any,
        image_data: Any = None,
        video_data: Any = None,
        **kwargs: Any,
    ) -> Any:
        image_data, video_data = await fetched(image_data, video_data)
        upstream = getattr(super(SafeSources, self), name)
        return await upstream(prompt, multimodal_tokens, image_data, video_data, **kwargs)

    return load


class SafeSources:
    """Of a processor, before SGLang's ``BaseMultimodalProcessor``."""

    fast_load_mm_data = _downloading("fast_load_mm_data")
    legacy_load_mm_data = _downloading("legacy_load_mm_data")

    @classmethod
    def _load_single_item(cls, data: Any, modality: Modality, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, KnownVideo):
            return data
        source = getattr(data, "url", data)
        if not isinstance(source, Downloaded):
            limits.limits.check_source(source)
        with reading():
            if modality == Modality.IMAGE:
                check_path(data)
            stamp = file_stamp(data)
            if modality == Modality.VIDEO:
                if (frames := frame_arrays(source)) is not None:
                    return frames
                if stamp is not None:
                    check_holds_frames(limits.path_of(source) or source)
            loaded = super()._load_single_item(  # type: ignore[misc]
                data, modality, *args, **kwargs
            )
        if isinstance(loaded, VideoDecoderWrapper):
            remember_stamp(loaded, stamp)
        return loaded
