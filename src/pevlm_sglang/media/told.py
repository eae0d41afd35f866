"""What a request says about its media outside the media themselves: read, or refused.

SGLang hands every field to every processor, whatever it reads. A number that nobody reads would be
another video than the one asked for; one that has no bound would be work and memory without one.
"""

from __future__ import annotations

import reprlib
from typing import Any

_TILES = "max_dynamic_patch"
_UNREAD = ("audio_data", "min_dynamic_patch", "images_config", "mm_processor_kwargs")
_KINDS = (None, "image", "multi-images", "video")
_SIDE = "max_long_side_pixel"


def check(request: Any) -> None:
    """Refuse what no processor here reads.

    Args:
        request: SGLang's ``GenerateReqInput``, of one prompt.

    Raises:
        ValueError: names the field, what was expected and what came.
    """
    for name in _UNREAD:
        if (value := getattr(request, name, None)) not in (None, [], {}):
            raise _error(name, "none, this model's processor does not read it", value)
    if sound := getattr(request, "use_audio_in_video", False):
        raise _error("use_audio_in_video", "none, no model here hears", sound)
    config = getattr(request, "video_config", None)
    # SGLang's chat endpoint adds "_question", for a model that PEVLM does not serve.
    if config is not None and (not isinstance(config, dict) or {*config} - {"_question"}):
        raise _error("video_config", "none; say it beside the video's url", config)
    for name in ("image_data", "video_data"):
        media = getattr(request, name, None)
        for medium in media if isinstance(media, list) else [media]:
            if (value := getattr(medium, _SIDE, None)) is not None:
                raise _error(_SIDE, "none, this model's processor does not read it", value)
    kinds = getattr(request, "modalities", None)
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str | None) or kind not in _KINDS:
            raise _error("modalities", ", ".join(filter(None, _KINDS)), kind)


def most_tiles(request: Any, kind: str, default: int, most: int) -> int:
    """Tiles that a picture of the request may become.

    Args:
        request: see :func:`check`.
        kind: ``image``, or ``video`` for a frame.
        default: where the request does not say.
        most: that it may ask for; 0 where the model cuts no picture in tiles.

    Raises:
        ValueError: see :func:`check`.
    """
    found = default
    for name in (_TILES, f"{kind}_{_TILES}"):  # the second takes precedence
        if (value := getattr(request, name, None)) is None:
            continue
        if not most:
            raise _error(name, "none, this model cuts no picture in a number of tiles", value)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise _error(name, f"1 to {most} tiles, what the context holds", value)
        found = value
    return found


def _error(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {reprlib.repr(got)}")
