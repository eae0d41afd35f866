"""Let ``max_pixels`` and ``frames`` of a chat request's ``video_url`` part reach the processors,
and refuse names there that nobody reads.

SGLang passes ``fps`` and ``max_frames`` on and drops names that its request model does not declare.
Before the HTTP server is built, ours are declared here and added to those that are passed on. On
``/generate``, SGLang passes on everything, but since 0.5.23 first looks for names that are not in a
list of its own (sglang/srt/entrypoints/api_contract.py), which has ``max_pixels`` and not
``frames``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.seams import REMEDY, wrap

logger = logging.getLogger(__name__)

NAMES = {"max_pixels": int, "frames": str}
"""Ours, and their types."""

_NOT_READ = ("min_dynamic_patch", "max_long_side_pixel")
"""SGLang's own names there, which no family's processor reads: refused, as names that it lacks."""

_MODELS = (
    "ChatCompletionMessageContentVideoURL",
    "ChatCompletionMessageContentVideoPart",
    "ChatCompletionMessageGenericParam",
    "ChatCompletionMessageUserParam",
    "ChatCompletionRequest",
)
"""From the part to the request: each holds a compiled copy of the one before it."""

_KEYS = "GLM_MEDIA_CONFIG_KEYS"
"""The names that reach ``VideoData.preprocess_kwargs``, in each module that makes one."""


def offer_wishes() -> None:
    """Declare our names. Idempotent; too late once the HTTP server's module is imported, which is
    then logged.

    Raises:
        UnsupportedError: this SGLang has another request model.
    """
    from sglang.srt.entrypoints.openai import protocol
    from sglang.srt.parser import conversation, jinja_template_utils

    missing = [name for name in _MODELS if not hasattr(protocol, name)]
    parsers = (conversation, jinja_template_utils)
    if missing or not all(hasattr(module, _KEYS) for module in parsers):
        raise _unsupported(f"lacks {', '.join(missing) or _KEYS}")
    if not NAMES.keys() <= protocol.ChatCompletionMessageContentVideoURL.model_fields.keys():
        if "sglang.srt.entrypoints.http_server" in sys.modules:
            logger.warning(
                "PEVLM: %s of a video_url part will be ignored: the HTTP server's module was "
                "imported before the server's arguments were resolved",
                " and ".join(NAMES),
            )
            return
        _declare([getattr(protocol, name) for name in _MODELS])
    _admit_on_generate()
    for module in parsers:
        known = getattr(module, _KEYS)
        setattr(module, _KEYS, (*known, *(name for name in NAMES if name not in known)))


def _admit_on_generate() -> None:
    try:
        from sglang.srt.entrypoints import api_contract
    except ImportError:  # before 0.5.23
        return

    def admit(error: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        def corrected(body: Any) -> str | None:
            if isinstance(body, dict) and "video_data" in body:
                body = {**body, "video_data": _without_frames(body["video_data"])}
            return error(body)

        return corrected

    wrap(api_contract, "generate_contract_error", admit, parameters=("body",))


def _without_frames(videos: Any) -> Any:
    """What the entries of ``video_data`` say otherwise; a prompt of a batch has a list of them."""
    if isinstance(videos, list):
        return [_without_frames(video) for video in videos]
    if isinstance(videos, dict) and isinstance(videos.get("frames"), str):
        return {name: value for name, value in videos.items() if name != "frames"}
    return videos


def _declare(models: list[Any]) -> None:
    from pydantic.fields import FieldInfo

    names = models[0].model_fields
    for name, kind in NAMES.items():
        form: Any = kind | None
        names[name] = FieldInfo(annotation=form, default=None)
    for name in _NOT_READ:
        if name in names:
            names[name] = FieldInfo(annotation=type(None), default=None)
    for model in models[:2]:  # a name that nobody reads is a 400, in the part and beside it
        model.model_config["extra"] = "forbid"
    for model in models:
        model.model_rebuild(force=True)
    wished = {name: kind("1") for name, kind in NAMES.items()}
    part = {"type": "video_url", "video_url": {"url": "", **wished}}
    body = {"model": "", "messages": [{"role": "user", "content": [part]}]}
    [message] = models[-1].model_validate(body).model_dump()["messages"]
    if not wished.items() <= message["content"][0]["video_url"].items():
        raise _unsupported("does not take a new field")


def _unsupported(why: str) -> UnsupportedError:
    return UnsupportedError(f"{', '.join(NAMES)} of a video_url part: this SGLang {why}; {REMEDY}")
