"""Broken media files, each from a number: the same number is the same file on every machine that
writes the same seeds."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from support.video import write_video

VIDEOS = {"h264.mp4": "libx264", "h264.mkv": "libx264", "h264.avi": "libx264", "h264.ts": "libx264"}
IMAGES = ("png", "jpg", "gif", "webp", "bmp", "tiff")
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# Of an MP4 file: sizes, counts, times, dimensions.
BOXES = (
    b"moov mvhd trak tkhd mdia mdhd hdlr minf stbl stsd avc1 avcC stts ctts stsc stsz stco elst "
    b"edts ftyp mdat stss"
).split()


def write_seeds(directory: Path) -> dict[str, bytes]:
    """Sound files, small: by name, which says the kind. Written once, then read."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, codec in VIDEOS.items():
        if not (path := directory / name).exists():
            write_video(path, seconds=4, size=(64, 48), seed=len(name), codec=codec)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for suffix in IMAGES:
        if not (path := directory / f"image.{suffix}").exists():
            Image.fromarray(pixels).save(path)
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def mutated(number: int, seeds: Mapping[str, bytes]) -> tuple[str, str, bytes]:
    """The kind of a mutation, the seed's name and the broken content.

    Args:
        number: of the input.
        seeds: see :func:`write_seeds`.
    """
    chance = random.Random(number)
    videos = [name for name in seeds if not name.startswith("image")]
    name = chance.choice(videos if chance.random() < 0.8 else [*seeds])
    kind = chance.choice([*MUTATIONS])
    content = bytearray(seeds[name])
    other = seeds[chance.choice([*seeds])]
    return kind, name, bytes(MUTATIONS[kind](chance, content, other))


def _truncated(chance: random.Random, content: bytearray, _other: bytes) -> bytearray:
    return content[: int(len(content) * chance.random() ** 2)]


def _flipped(chance: random.Random, content: bytearray, _other: bytes) -> bytearray:
    for _ in range(2 ** chance.randrange(8)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def _spliced(chance: random.Random, content: bytearray, other: bytes) -> bytearray:
    """A part of another file, or of itself, in place of a part or between two."""
    source = other if chance.random() < 0.5 else bytes(content)
    start = chance.randrange(len(source))
    part = source[start : start + 2 ** chance.randrange(12)]
    at = chance.randrange(len(content))
    content[at : at + chance.choice([0, len(part)])] = part
    return content


def _wrong_header(chance: random.Random, content: bytearray, other: bytes) -> bytearray:
    length = 2 ** chance.randrange(2, 8)
    header = other[:length] if chance.random() < 0.7 else chance.randbytes(length)
    content[: len(header)] = header
    return content


def _huge_sizes(chance: random.Random, content: bytearray, _other: bytes) -> bytearray:
    """Extremes in a field of a header, where the format's fields are known; anywhere otherwise."""
    for _ in range(chance.randrange(1, 4)):
        value, width = chance.choice(EXTREMES), chance.choice([1, 2, 4])
        box = content.find(chance.choice(BOXES))
        if content.startswith(b"\x89PNG"):
            at, width = chance.choice([16, 20]), 4
        elif content.startswith(b"GIF8"):
            at, width = chance.choice([6, 8]), 2
        elif content.startswith(b"BM"):
            at = chance.choice([2, 10, 14, 18, 22, 28])
        elif box >= 4:
            at = box - 4 if chance.random() < 0.3 else box + 4 * chance.randrange(1, 24)
        else:
            at = chance.randrange(min(len(content), 512))
        content[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")
    if content.startswith(b"\x89PNG"):
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return content


MUTATIONS: dict[str, Callable[[random.Random, bytearray, bytes], bytearray]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "spliced": _spliced,
    "wrong header": _wrong_header,
    "huge sizes": _huge_sizes,
}
"""Kind → what it makes of a file, given another."""
