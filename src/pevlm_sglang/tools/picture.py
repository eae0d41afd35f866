"""The mask of a prompt as a PNG; matplotlib is the optional extra ``png``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pevlm_sglang.tools.show import Prompt

WIDTH, HEIGHT = 900, 864
"""Of the picture, in pixels."""

LEFT, TOP, SIDE = 116, 12, 772
"""The square that holds the mask, in pixels from the left and the top of the picture."""

# In greyscale too, each differs from the others.
COLOURS = {
    "future": "#ffffff",
    "skipped": "#efefef",
    "sink": "#12355b",
    "sink of block": "#5b93c7",
    "block": "#f6b149",
    "question": "#7b3f8c",
}
"""Colour of a (query, key) pair."""

_LEGEND = {
    "sink": "sink: text and first frames, causal",
    "sink of block": "a block attends to the sink",
    "block": "a block attends to itself, causal",
    "question": "question: attends to everything",
    "skipped": "skipped",
}
_DPI = 100
_MOST_TICKS = 130  # steps, above which only the parts get ticks
_MOST_LINES = 40  # parts, above which no line is drawn between them
_MOST_LABELS = 8  # blocks with a name on an axis
_LEAST_LABEL = 0.06  # of the axis, for a name to fit under it
INK = "#333333"

MISSING = "matplotlib is not installed; install it with: pip install 'pevlm-sglang[png]'"


def draw_png(prompt: Prompt, path: Path) -> None:
    """Draw the mask of a prompt: queries downwards, keys to the right. Each pixel is the pair in
    its centre, so a prompt of any length is drawn exactly.

    Raises:
        ValueError: matplotlib is not installed, or the picture cannot be written.
    """
    figure = new_figure(WIDTH, HEIGHT)
    from matplotlib.patches import Patch

    axes = figure.add_axes((LEFT / WIDTH, 1 - (TOP + SIDE) / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT))
    extent = (0, prompt.length, prompt.length, 0)
    axes.imshow(_pixels(prompt), extent=extent, interpolation="none")
    _label(axes, prompt)
    handles = [
        Patch(facecolor=COLOURS[name], edgecolor=INK, linewidth=0.5, label=text)
        for name, text in _LEGEND.items()
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=13.5, frameon=False, labelcolor=INK)
    save(figure, path)


def available() -> bool:
    return find_spec("matplotlib") is not None


def new_figure(width: int, height: int, **options: Any) -> Any:
    """An empty white figure of so many pixels, or ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(MISSING) from None
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white", **options)


def save(figure: Any, path: Path) -> None:
    """Write a PNG, or ValueError where that cannot be."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def _pixels(prompt: Prompt) -> Any:
    """``[SIDE, SIDE, 3]`` uint8: the colour of each pixel's pair."""
    import numpy as np

    rgb = {name: np.frombuffer(bytes.fromhex(COLOURS[name][1:]), np.uint8) for name in COLOURS}
    positions = ((np.arange(SIDE) + 0.5) * prompt.length / SIDE).astype(np.int64)
    picture = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    for row, query in zip(picture, positions.tolist(), strict=True):
        block = prompt.layout.block_of(query)
        if block is None:
            row[:] = rgb["sink" if query < prompt.sink[1] else "question"]
        else:
            row[:] = rgb["skipped"]
            for start, end in block.sink:
                row[(start <= positions) & (positions < end)] = rgb["sink of block"]
            row[positions >= block.extent_start] = rgb["block"]
        row[positions > query] = rgb["future"]
    return picture


def _label(axes: Any, prompt: Prompt) -> None:
    """Ticks at the borders of steps, names of the parts at the left, their frames below."""
    parts, video = prompt.parts, prompt.spans
    ranges = video.steps if len(video.steps) < _MOST_TICKS else [tokens for _, tokens in parts]
    borders = [video.start, *(end for _, end in ranges)]
    if len(parts) <= _MOST_LINES:
        for _, (_, end) in parts[:-1]:
            axes.plot([0, end], [end, end], color="white", linewidth=0.8)
    stride = -(-len(parts) // _MOST_LABELS)
    named = [*parts[:-1:stride], parts[-1]]
    below = [
        (frames, (max(tokens[0], video.start), tokens[1]))
        for _, tokens in named
        if (frames := prompt.frames_in(tokens)) != "-"
    ]
    least = _LEAST_LABEL * prompt.length
    texts = ("text", (0, video.start)), ("question", parts[-1][1])
    below += [(name, (start, end)) for name, (start, end) in texts if end - start >= least]
    style = {"fontsize": 13, "color": INK, "labelpad": 7}
    axes.set_xlabel("keys (numbers: sampled frames)", **style)
    axes.set_ylabel("queries", **style)
    for axis, labels in ((axes.yaxis, named), (axes.xaxis, below)):
        axis.remove_overlapping_locs = False  # a name may stand in the middle of a step
        axis.set_ticks(borders, minor=True)
        axis.set_ticks([(x + y) / 2 for _, (x, y) in labels], [name for name, _ in labels])
        axis.set_tick_params(which="major", length=0, labelsize=12, labelcolor=INK, pad=9)
        axis.set_tick_params(which="minor", length=6, width=0.8, color=INK)
    axes.spines[:].set(linewidth=0.8, color=INK)
