"""An SGLang plugin that breaks PEVLM's mask, a request at a time, for the accuracy gate to catch.

A request names its breakage in SGLang's ``extra_key``, ``broken:NAME`` (a key of ``BREAKAGES``),
which also keeps its KV apart from every other request's. ``plugin_path`` makes the plugin known to
a server, by entry point as any plugin is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

MARK = "broken:"


def plugin_path(directory: Path, module: str = "broken_masks") -> str:
    """What to put on a server's ``PYTHONPATH``.

    Args:
        directory: where the plugin's metadata are written.
        module: of this package, with the plugin's ``register``.
    """
    metadata = directory / f"{module}-1.dist-info"
    metadata.mkdir()
    name = module.replace("_", "-")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    entry_point = f"[sglang.srt.plugins]\n{module} = support.{module}:register\n"
    (metadata / "entry_points.txt").write_text(entry_point)
    return f"{directory}:{Path(__file__).parents[1]}"


def register() -> None:
    """Entry point ``sglang.srt.plugins``."""
    from pevlm_sglang import requests

    on_queued = requests.on_queued

    def broken_on_queued(req: Any, rule: Any, *args: Any) -> None:
        on_queued(req, rule, *args)
        _, mark, name = (req.extra_key or "").partition(MARK)
        laid_out = getattr(req.multimodal_inputs, "pevlm", None)
        if mark and laid_out is not None and laid_out.dense_reason is None:
            layout = BREAKAGES[name](req, rule, laid_out.layout)
            req.multimodal_inputs.pevlm = replace(laid_out, layout=layout)

    requests.on_queued = broken_on_queued  # type: ignore[assignment]


def _shifted(req: Any, rule: Any, layout: Any, *, steps: int) -> Any:
    """Every boundary, the sink's end and those of the blocks, some steps later."""
    from pevlm_sglang.layout import Layout

    config = req.pevlm_config
    videos = rule.spans(req.multimodal_inputs, req.origin_input_ids, image_runs=config.image_runs)
    return Layout.build(
        videos,
        sink_frames=config.sink_frames + steps * rule.frames_per_step,
        block_frames=config.block_frames,
    )


def _without_sink(_req: Any, _rule: Any, layout: Any) -> Any:
    """Blocks that see themselves alone."""
    return replace(layout, blocks=tuple(replace(block, sink=()) for block in layout.blocks))


def _positions_reused(req: Any, _rule: Any, layout: Any) -> Any:
    """The mask as it is, but each block has the first one's positions in time, and the text goes on
    behind the largest."""
    inputs, (first, *others) = req.multimodal_inputs, layout.blocks
    right = inputs.mrope_positions
    positions = right.clone()
    for block in others:
        positions[0, block.start : block.end] -= right[0, block.start] - right[0, first.start]
    end = layout.blocks[-1].end
    positions[:, end:] += positions[:, :end].max() + 1 - right[:, end].max()
    inputs.mrope_positions = positions
    inputs.mrope_position_delta = positions.max(1).values[:1, None] + 1 - positions.shape[1]
    return layout


BREAKAGES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "a step late": partial(_shifted, steps=1),
    "a step early": partial(_shifted, steps=-1),
    "without sink": _without_sink,
    "positions reused": _positions_reused,
}
"""Name → what it makes of a request, the span rule and the right layout."""
