"""What a client gives as an image or a video. Its faults cost HTTP 400, and nothing else.

SGLang answers some of them with HTTP 500: a picture that Pillow takes for a decompression bomb, and
every path that cannot be read. And it reads an image from any path, a device or a pipe that never
ends among them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlparse

from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.utils import CLIENT_MEDIA_EXCEPTIONS
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.media import limits
from pevlm_sglang.media.frame_arrays import frame_arrays
from pevlm_sglang.media.identity import file_stamp, remember_stamp

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


class SafeSources:
    """Of a processor, before SGLang's ``BaseMultimodalProcessor``."""

    @classmethod
    def _load_single_item(cls, data: Any, modality: Modality, *args: Any, **kwargs: Any) -> Any:
        limits.limits.check_source(data)
        with reading():
            if modality == Modality.IMAGE:
                check_path(data)
            if modality == Modality.VIDEO:
                source = getattr(data, "url", data)
                if (frames := frame_arrays(source)) is not None:
                    return frames
            stamp = file_stamp(data)
            loaded = super()._load_single_item(  # type: ignore[misc]
                data, modality, *args, **kwargs
            )
        if isinstance(loaded, VideoDecoderWrapper):
            remember_stamp(loaded, stamp)
        return loaded
