"""Procedural videos: one object a second, drawn large in a quarter of a small frame.

A video is a list of scenes of one second, two frames each at 2 frames a second, which is one step
of Qwen2.5-VL's vision tower. A scene shows one object (shape, colour, quarter of the frame), or a
code of two digits. The ground below and the sky above differ, and so do left and right, so that a
quarter looks like itself. Every frame has its own noise, jitter and brightness.

The world is drawn in :func:`make_world`, the pixels in :func:`render`; :func:`write_mp4` encodes
them with H.264.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

SIDE = 28  # pixels of a quarter: one token after the merge
FRAME = 2 * SIDE
FPS = 2.0
COLOURS = {
    "red": (225, 40, 40),
    "green": (30, 170, 50),
    "blue": (50, 70, 235),
    "yellow": (240, 220, 40),
    "purple": (180, 50, 200),
    "white": (245, 245, 245),
}
FILLERS = ("disc", "square")
EVENTS = ("star", "cross", "ring", "triangle", "diamond", "bar", "heart", "arrow")
SHAPES = (*FILLERS, *EVENTS)
PLACES = ("northwest", "northeast", "southwest", "southeast")
CODE = len(SHAPES)  # the shape number of a scene that shows the code
MAX_COUNT = 3  # occurrences of one event shape
GROUND = np.array([[(70, 90, 120), (40, 55, 80)], [(95, 75, 50), (60, 45, 28)]], dtype=np.float32)
SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcfgd")


@dataclass(frozen=True)
class World:
    """What a video shows.

    Attributes:
        shapes, colours, places: ``[scenes]`` int64, indices of the tuples above; ``CODE`` as a
            shape is the scene of the code, whose colour and place say nothing.
        code: its two digits.
    """

    shapes: np.ndarray
    colours: np.ndarray
    places: np.ndarray
    code: tuple[int, int]

    def __len__(self) -> int:
        return len(self.shapes)


def make_world(rng: np.random.Generator, scenes: int) -> World:
    """A video in which two event shapes occur once each and the others 0 to ``MAX_COUNT`` times,
    as far as there is room; the rest is filled with discs and squares.

    Args:
        scenes: at least 4.

    Raises:
        ValueError: too few scenes.
    """
    if scenes < 4:
        raise ValueError(f"scenes: expected >= 4, got {scenes}")
    shapes = rng.integers(0, len(FILLERS), scenes)
    free = list(rng.permutation(scenes))
    room = max(3, round(0.6 * scenes))
    shapes[free.pop()] = CODE
    for i, event in enumerate(rng.permutation(len(EVENTS))):
        count = 1 if i < 2 else int(rng.integers(0, MAX_COUNT + 1))
        for _ in range(min(count, len(free) + room - scenes)):
            shapes[free.pop()] = len(FILLERS) + event
    return World(
        shapes,
        rng.integers(0, len(COLOURS), scenes),
        rng.integers(0, len(PLACES), scenes),
        (int(rng.integers(10)), int(rng.integers(10))),
    )


@lru_cache
def sprites() -> torch.Tensor:
    """``[shapes, SIDE, SIDE]`` coverage, 0 to 1, of each shape about the middle of a quarter."""
    scale = 4
    axis = (np.arange(SIDE * scale) + 0.5) / (SIDE * scale) * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    y, x = y / 0.8, x / 0.8  # the margin that the jitter takes
    r = np.hypot(x, y)
    angle = np.arctan2(y, x)
    by_name = {
        "disc": r < 0.85,
        "square": np.maximum(abs(x), abs(y)) < 0.75,
        "star": r < 0.42 + 0.55 * abs((((angle / np.pi * 2.5 + 0.25) % 1) - 0.5) * 2),
        "cross": (np.minimum(abs(x), abs(y)) < 0.24) & (np.maximum(abs(x), abs(y)) < 0.95),
        "ring": (r < 0.95) & (r > 0.55),
        "triangle": (y < 0.75) & (y > 2 * abs(x) - 0.95),
        "diamond": abs(x) + abs(y) < 0.95,
        "bar": (abs(y) < 0.28) & (abs(x) < 0.98),
        "heart": (np.hypot(abs(x) - 0.42, y + 0.3) < 0.48)
        | ((y > -0.25) & (abs(x) * 1.05 + y * 0.95 < 0.85)),
        "arrow": ((abs(y) < 0.2) & (x < 0.2) & (x > -0.95)) | ((x > 0.1) & (x + abs(y) < 0.95)),
    }
    masks = np.stack([by_name[name] for name in SHAPES]).astype(np.float32)
    masks = masks.reshape(len(SHAPES), SIDE, scale, SIDE, scale).mean((2, 4))
    return torch.from_numpy(masks)


@lru_cache
def digits() -> torch.Tensor:
    """``[10, SIDE, SIDE]`` coverage of seven-segment digits."""
    boxes = {  # rows and columns
        "a": (4, 7, 8, 20),
        "b": (5, 14, 17, 20),
        "c": (14, 24, 17, 20),
        "d": (21, 24, 8, 20),
        "e": (14, 24, 8, 11),
        "f": (5, 14, 8, 11),
        "g": (12, 15, 8, 20),
    }
    masks = torch.zeros(10, SIDE, SIDE)
    for digit, segments in enumerate(SEGMENTS):
        for segment in segments:
            top, bottom, left, right = boxes[segment]
            masks[digit, top:bottom, left:right] = 1
    return masks


@lru_cache
def pictures() -> torch.Tensor:
    """``[pictures, 3, FRAME, FRAME]`` fp32, 0 to 255: every scene that there is, without noise.

    First the objects in the order shape, colour, place, then the codes 00 to 99.
    """
    ground = torch.from_numpy(GROUND).permute(2, 0, 1)
    ground = ground.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    found = []
    for mask in sprites():
        for colour in palette:
            for place in range(len(PLACES)):
                picture = ground.clone()
                rows, columns = _quarter(place)
                part = picture[:, rows, columns]
                picture[:, rows, columns] = part + mask * (colour[:, None, None] - part)
                found.append(picture)
    for code in range(100):
        picture = ground.clone()
        for place, digit in enumerate((code // 10, code % 10)):
            rows, columns = _quarter(place)
            picture[:, rows, columns] = 20 + 225 * digits()[digit]
        found.append(picture)
    return torch.stack(found)


def picture_ids(world: World) -> np.ndarray:
    """``[scenes]`` index into :func:`pictures`."""
    ids = (world.shapes * len(COLOURS) + world.colours) * len(PLACES) + world.places
    first, second = world.code
    code = len(SHAPES) * len(COLOURS) * len(PLACES) + 10 * first + second
    return np.where(world.shapes == CODE, code, ids)


@lru_cache
def quarter_labels() -> torch.Tensor:
    """``[pictures, 4, 2]`` int64: what each quarter of a picture shows, and in which colour.

    Shapes first, then the digits, then nothing; the colours, then none.
    """
    shapes, colours = len(SHAPES), len(COLOURS)
    nothing = torch.tensor([shapes + 10, colours])
    labels = nothing.repeat(len(pictures()), 4, 1)
    objects = shapes * colours * 4
    index = torch.arange(objects)
    shown = torch.stack([index // (4 * colours), index // 4 % colours], 1)
    labels[index, index % 4] = shown
    code = torch.arange(100)
    labels[objects + code, 0, 0] = shapes + code // 10
    labels[objects + code, 1, 0] = shapes + code % 10
    return labels


def render(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``[n, 2, 3, FRAME, FRAME]`` fp32, 0 to 255: two noisy frames of each picture.

    Args:
        ids: ``[n]`` int64, indices of :func:`pictures`.
    """
    clean = torch.nn.functional.pad(pictures()[ids], (2, 2, 2, 2), mode="replicate")
    shift = torch.randint(0, 5, (len(ids), 2), generator=generator)
    rows = shift[:, :1] + torch.arange(FRAME)
    columns = shift[:, 1:] + torch.arange(FRAME)
    n = torch.arange(len(ids))[:, None, None]
    clean = clean.permute(0, 2, 3, 1)[n, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    light = 0.85 + 0.3 * torch.rand(len(ids), 1, 1, 1, 1, generator=generator)
    strength = 10 * torch.rand(len(ids), 1, 1, 1, 1, generator=generator)
    noise = torch.randn(len(ids), 2, 3, FRAME, FRAME, generator=generator)
    # What H.264 does to a small frame: colours run, at half the resolution of the luminance.
    soft = torch.nn.functional.avg_pool2d(clean, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    luma = clean.mean(1, keepdim=True) - soft.mean(1, keepdim=True)
    mixed = torch.where(
        torch.rand(len(ids), 1, 1, 1, generator=generator) < 0.5, clean, soft + luma
    )
    return (mixed[:, None] * light + strength * noise).clamp(0, 255)


def render_world(world: World, seed: int) -> torch.Tensor:
    """``[2 * scenes, 3, FRAME, FRAME]`` uint8 frames of a video."""
    generator = torch.Generator().manual_seed(seed)
    frames = render(torch.from_numpy(picture_ids(world)), generator)
    return frames.flatten(0, 1).round().to(torch.uint8)


def write_mp4(path: Path, frames: torch.Tensor, fps: float = FPS, group: int | None = None) -> Path:
    """Encode frames with H.264; a server that samples ``fps`` keeps each.

    Args:
        group: frames from a keyframe to the next; None = what the encoder likes.
    """
    from torchcodec.encoders import VideoEncoder

    path.parent.mkdir(parents=True, exist_ok=True)
    VideoEncoder(frames, frame_rate=fps).to_file(
        path,
        codec="libx264",
        pixel_format="yuv420p",
        crf=16,
        preset="veryfast",
        extra_options={} if group is None else {"g": str(group), "sc_threshold": "0"},
    )
    return path


def _quarter(place: int) -> tuple[slice, slice]:
    row, column = divmod(place, 2)
    return slice(row * SIDE, (row + 1) * SIDE), slice(column * SIDE, (column + 1) * SIDE)
