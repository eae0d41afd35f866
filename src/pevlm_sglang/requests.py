"""A request in the scheduler: its configuration, its cache namespace, its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pevlm_sglang.families.spans import SpanRule
from pevlm_sglang.layout import Layout
from pevlm_sglang.observe.observer import (
    DISABLED,
    IMAGE_RUNS_OFF,
    NO_VIDEO,
    SHORT_VIDEO,
    RequestLayout,
)
from pevlm_sglang.settings.config import PevlmConfig

NAMESPACE = "pevlm:"

MOST_KEYS = 2**27
"""Of all virtual sequences in one forward: an index list of 1 GiB, and as much again a few times
while it is made. A million tokens of video with 4k in sink and block have fewer than 2**22."""


def on_created(req: Any, server_config: PevlmConfig) -> None:
    """Resolve the request's configuration and give its KV a namespace.

    The KV of a LOCAL token depends on the configuration, so a request must never hit a prefix that
    was computed under another one. The tag goes in front of ``extra_key``: SGLang reads LoRA ids
    from its end (sglang/srt/managers/schedule_batch.py).

    Args:
        req: SGLang's ``Req``, just constructed. A bad override is kept for :func:`on_queued`.
    """
    params = getattr(req.sampling_params, "custom_params", None)
    req.pevlm_error = None
    try:
        req.pevlm_config = server_config.for_request(params)
    except ValueError as error:
        req.pevlm_config, req.pevlm_error = server_config, str(error)
    namespace = req.pevlm_config.cache_namespace
    if namespace is not None:
        req.extra_key = f"{NAMESPACE}{namespace}|{req.extra_key or ''}"


def on_queued(req: Any, rule: SpanRule, forward_tokens: int | None = None) -> None:
    """Lay out a request that is about to wait for prefill, or refuse it with HTTP 400.

    The layout becomes an attribute of the request's ``MultimodalInputs``, which reach the forward
    with the batch.

    Args:
        forward_tokens: of a chunk; None where prompts are not chunked.
    """
    if req.to_finish is not None and req.multimodal_inputs is None:
        return  # refused already, for another reason
    error = req.pevlm_error or _session_conflict(req)
    if error is None and req.multimodal_inputs is not None:
        try:
            layout = lay_out(req.multimodal_inputs, req.origin_input_ids, rule, req.pevlm_config)
            _check_size(layout.layout, len(req.origin_input_ids), forward_tokens)
        except ValueError as refusal:  # FrameSpanError, or spans that make no layout
            error = str(refusal)
        else:
            if req.session is not None:
                # The turns of a session share one object; their configurations may differ.
                req.multimodal_inputs = dataclasses.replace(req.multimodal_inputs)
            req.multimodal_inputs.pevlm = layout
    if error is not None:
        req.set_finish_with_abort(f"PEVLM: {error}")


def lay_out(inputs: Any, ids: Sequence[int], rule: SpanRule, config: PevlmConfig) -> RequestLayout:
    """The layout of a request's ``MultimodalInputs``.

    Raises:
        ValueError: they do not say where the frames lie (``FrameSpanError``), or say it of frames
            that overlap.
    """
    if not config.enabled:
        return RequestLayout(Layout(), DISABLED)
    videos = rule.spans(inputs, ids, image_runs=config.image_runs)
    layout = Layout.build(videos, sink_frames=config.sink_frames, block_frames=config.block_frames)
    if layout.first_sparse is not None:
        return RequestLayout(layout, None)
    if videos:
        return RequestLayout(layout, SHORT_VIDEO)
    has_images = any(item.is_image() for item in inputs.mm_items)
    return RequestLayout(layout, IMAGE_RUNS_OFF if has_images else NO_VIDEO)


def _check_size(layout: Layout, length: int, forward_tokens: int | None) -> None:
    """Refuse what would list too many keys in a forward: a huge sink, seen by many small blocks."""
    window = min(length, forward_tokens or length)
    if layout.first_sparse is not None and (keys := layout.most_keys(length, window)) > MOST_KEYS:
        raise ValueError(
            f"sink_frames, block_frames: expected at most {MOST_KEYS} keys in the lists of a "
            f"forward of {window} tokens, got {keys}; ask for larger blocks or a smaller sink, or "
            "serve with a smaller --chunked-prefill-size"
        )


def _session_conflict(req: Any) -> str | None:
    """What the history of a session makes impossible."""
    session = req.session
    if session is None:
        return None
    items = req.multimodal_inputs.mm_items if req.multimodal_inputs is not None else ()
    if not all(_holds(req.origin_input_ids, item) for item in items):
        return (
            "session: expected the videos and images of its history in the prompt, got a prompt "
            "that an offset cut short of them; send this turn outside the session"
        )
    if not getattr(session, "streaming", False):
        return None
    # A streaming session keeps its KV outside the radix cache, where no namespace protects it.
    namespace = req.pevlm_config.cache_namespace
    first = session.__dict__.setdefault("pevlm_namespace", namespace)
    if first != namespace:
        return (
            "custom_params['pevlm']: expected the setting of the first turn of this streaming "
            "session, whose KV it continues, got another one; open a new session for it"
        )
    return None


def _holds(ids: Sequence[int], item: Any) -> bool:
    """Whether an item's placeholders still stand where its offsets say."""
    pads = getattr(item, "pad_values", None) or (item.pad_value,)
    return all(
        end < len(ids) and ids[start] in pads and ids[end] in pads
        for start, end in item.offsets or ()
    )
