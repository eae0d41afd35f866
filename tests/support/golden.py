"""A prompt and its frame spans as text, a line a run of tokens: the files in ``tests/golden``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from support.spec_mask import Steps


def describe(
    tokenizer: Any, ids: Sequence[int], videos: Sequence[Steps], placeholders: Mapping[int, str]
) -> str:
    """One line a step, and one a run of tokens outside videos.

    Args:
        tokenizer: of the model.
        ids: of the expanded prompt, with the placeholder tokens themselves.
        videos: the steps of each video.
        placeholders: token id → the name by which a run of it is counted.
    """
    runs = [
        (start, end, f"video {v} step {j}")
        for v, steps in enumerate(videos)
        for j, (start, end) in enumerate(steps)
    ]
    edges = [0, *(edge for start, end, _ in runs for edge in (start, end)), len(ids)]
    runs += [
        (start, end, "text")
        for start, end in zip(edges[::2], edges[1::2], strict=True)
        if start < end
    ]
    return "".join(
        f"[{start}, {end}) {name}  {_content(tokenizer, ids[start:end], placeholders)}\n"
        for start, end, name in sorted(runs)
    )


def _content(tokenizer: Any, ids: Sequence[int], placeholders: Mapping[int, str]) -> str:
    """``"text" + 6 pads + "text"``."""
    marked = "".join(
        chr(0xE000 + list(placeholders).index(i)) if i in placeholders else "-" for i in ids
    )
    parts: list[str] = []
    for run in re.finditer(r"(.)\1*", marked):
        start, end = run.span()
        if ids[start] in placeholders:
            parts.append(f"{end - start} {placeholders[ids[start]]}")
        else:
            text = tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False)
            parts.append(json.dumps(text, ensure_ascii=False))
    return " + ".join(parts)
