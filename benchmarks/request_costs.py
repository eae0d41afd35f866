"""What one request costs the scheduler's loop, in which no other request is served meanwhile: its
part of bench_plan.py.

The two hooks on SGLang's ``Req``, on its own ``MultimodalDataItem`` and the prompt's token ids, and
apart the three things that the second consists of:

- ``created``: an override is read, and the cache gets its namespace.
- ``queued``: all of what follows, when the request begins to wait for prefill.
- ``spans``: where the frames lie; by the family's rule, checked against the prompt.
- ``layout``: the blocks.
- ``size``: the bound of the lists of a forward.

A video of a step a frame, or of two frames a step, sink and blocks of one step: as many blocks as
there can be. ``images`` is the worst that a request can ask for: pictures too far apart for a run,
each a block of its own with all text before it in its sink; beyond a bound, that is refused.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

from pevlm_sglang.families.internvl import spans as internvl
from pevlm_sglang.families.llava_video import spans as llava_video
from pevlm_sglang.families.longvila import spans as longvila
from pevlm_sglang.families.qwen_vl import spans as qwen_vl
from pevlm_sglang.families.qwen_vl import timestamps as qwen3_vl
from pevlm_sglang.families.spans import IMAGE_RUN_GAP, SpanRule, leave_labels
from pevlm_sglang.layout import Layout
from pevlm_sglang.requests import _check_size, on_created, on_queued
from pevlm_sglang.settings.config import PevlmConfig

STEPS = (10, 100, 1_000, 10_000)
TOKENS = 64  # of a step
TEXT = [7] * 20  # before and after the video
OPENING, CLOSING, LABEL, NEWLINE = 1, 2, 3, 4  # token ids of what processors write around a step


class Kind(NamedTuple):
    """A request by its steps.

    Attributes:
        rule: of the family.
        around: token ids before and after a step, of its own.
        gap: tokens of text between two steps.
        item: of its placeholders' offsets.
    """

    rule: SpanRule
    around: tuple[list[int], list[int]]
    gap: int
    item: Callable[[list[tuple[int, int]]], MultimodalDataItem]


def _video(offsets: list[tuple[int, int]], **data: Any) -> MultimodalDataItem:
    return MultimodalDataItem(modality=Modality.VIDEO, offsets=offsets, model_specific_data=data)


def _whole(data: Callable[[int], dict[str, Any]], offsets: list[Any]) -> MultimodalDataItem:
    """A video that is one offset for all steps."""
    return _video([(offsets[0][0], offsets[-1][1])], **data(len(offsets)))


def _labelled(label: int, offsets: list[tuple[int, int]]) -> MultimodalDataItem:
    item = _video(offsets)
    leave_labels(item, [(len(offsets), label)])
    return item


def _images(offsets: list[tuple[int, int]]) -> MultimodalDataItem:
    return MultimodalDataItem(modality=Modality.IMAGE, offsets=offsets)


_NOTED = {"text_before": [], "text_after": [NEWLINE]}
KINDS = {
    "qwen2_5_vl": Kind(
        SpanRule(qwen_vl, 2),
        ([], []),
        0,
        partial(_whole, lambda steps: {"video_grid_thw": [[steps, 16, 16]]}),
    ),
    "qwen3_vl": Kind(
        SpanRule(qwen3_vl, 2), ([LABEL] * 7 + [OPENING], [CLOSING]), 0, partial(_labelled, 7)
    ),
    "internvl": Kind(
        SpanRule(internvl, 1),
        ([LABEL] * 4 + [OPENING], [CLOSING, NEWLINE]),
        0,
        partial(_labelled, 4),
    ),
    "llava_video": Kind(
        SpanRule(llava_video, 1),
        ([], []),
        0,
        partial(_whole, lambda steps: {llava_video.FRAMES: steps}),
    ),
    "longvila": Kind(SpanRule(longvila, 1), ([], [NEWLINE]), 0, lambda at: _video(at, **_NOTED)),
    "images": Kind(SpanRule(qwen_vl, 2), ([OPENING], [CLOSING]), IMAGE_RUN_GAP + 1, _images),
}


def make_request(kind: Kind, steps: int) -> tuple[list[int], Any]:
    """Token ids of the prompt, and SGLang's ``MultimodalInputs`` as far as they are read."""
    before, after = kind.around
    ids, offsets = [*TEXT], []
    for _ in range(steps):
        ids += before
        offsets.append((len(ids), len(ids) + TOKENS - 1))
        ids += [0] * TOKENS + after + TEXT[:1] * kind.gap
    ids += TEXT
    item = kind.item(offsets)
    item.set_hash(1)
    for start, end in item.offsets:
        ids[start : end + 1] = [item.pad_value] * (end + 1 - start)
    inputs = SimpleNamespace(mm_items=[item], im_start_id=OPENING, im_end_id=CLOSING)
    return ids, inputs


def request_row(name: str, steps: int, forward_tokens: int) -> dict[str, Any]:
    """Microseconds of one request's hooks, the shortest of some calls; ``refused`` has the reason
    where the request is refused."""
    kind = KINDS[name]
    ids, inputs = make_request(kind, steps)
    images = name == "images"
    frames = kind.rule.frames_per_step
    wish = {"sink_frames": 0 if images else frames, "block_frames": frames, "image_runs": images}
    row: dict[str, Any] = {"request": name, "steps": steps, "length": len(ids), "refused": None}
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(custom_params={"pevlm": wish}),
        extra_key=None,
        session=None,
        to_finish=None,
        origin_input_ids=ids,
        multimodal_inputs=inputs,
        set_finish_with_abort=lambda reason: row.update(refused=reason),
    )

    def created() -> None:
        request.extra_key = None
        on_created(request, PevlmConfig())

    created_us = _microseconds(created)
    config = request.pevlm_config
    rule_spans = partial(kind.rule.spans, inputs, ids, image_runs=images)
    sizes = {"sink_frames": config.sink_frames, "block_frames": config.block_frames}
    build = partial(Layout.build, rule_spans(), **sizes)
    times = {
        "created_us": created_us,
        "queued_us": _microseconds(partial(on_queued, request, kind.rule, forward_tokens)),
        "spans_us": _microseconds(rule_spans),
    }
    if row["refused"] is None:
        blocks = build().blocks
        row["blocks"] = len(blocks)
        times["layout_us"] = _microseconds(build)
        # A layout without what it remembers.
        check = partial(_check_size, length=len(ids), forward_tokens=forward_tokens)
        times["size_us"] = _microseconds(lambda: check(Layout(blocks)))
    return row | times


def _microseconds(function: Callable[[], Any], limit_s: float = 0.5, most: int = 50) -> float:
    """The shortest time of some calls, of the processor: others on the machine add nothing."""
    times: list[float] = []
    while len(times) < most and sum(times) < limit_s:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times) * 1e6


def request_rows(forward_tokens: int) -> list[dict[str, Any]]:
    """All kinds by all steps, printed as they come."""
    gc.freeze()  # as a server of SGLang does once it is up
    rows = []
    for name in KINDS:
        for steps in STEPS:
            rows.append(request_row(name, steps, forward_tokens))
            print(request_line(rows[-1]), flush=True)
    return rows


TIMES = ("created", "spans", "layout", "size", "queued")
REQUEST_HEADER = f"{'request':12}{'steps':>7}{'tokens':>9}{'blocks':>8}" + "".join(
    f"{f'{name} us':>12}" for name in TIMES
)


def request_line(row: dict[str, Any]) -> str:
    found = (row.get(f"{name}_us") for name in TIMES)
    times = "".join(f"{'':12}" if us is None else f"{us:>12.1f}" for us in found)
    blocks = row.get("blocks", "refused")
    return f"{row['request']:12}{row['steps']:>7}{row['length']:>9}{blocks:>8}{times}"
