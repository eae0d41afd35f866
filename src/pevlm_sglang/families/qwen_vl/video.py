"""A video as qwen-vl-utils samples and resizes it, and in patches as transformers cuts it.

Slices of frames (:mod:`pevlm_sglang.media.slices`) go straight into the vision tower's input, so
that no other copy of the video exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from pevlm_sglang.families.qwen_vl.sizes import QwenGeometry, VideoSettings
from pevlm_sglang.media import keyframes
from pevlm_sglang.media.clips import ClipBuffer, Room
from pevlm_sglang.media.fixed_point import bicubic, work_bytes
from pevlm_sglang.media.frame_arrays import FrameArrays
from pevlm_sglang.media.pixel_device import PixelDevice
from pevlm_sglang.media.stages import stage
from pevlm_sglang.media.video_file import length_and_rate
from pevlm_sglang.media.wishes import Wishes

_PIXELS_AT_ONCE = 1 << 22  # of a resize in fp32


@dataclass(frozen=True)
class Sampled:
    """Which frames of a file are sampled, and what becomes of them.

    Attributes:
        indices: of the frames.
        size: width and height after the resize.
        metadata: as transformers' processor takes it.
    """

    indices: list[int]
    size: tuple[int, int]
    metadata: dict[str, Any]

    def grid(self, geometry: QwenGeometry) -> tuple[int, int, int]:
        """Steps, patches in a column, patches in a row."""
        width, height = self.size
        steps = -(-len(self.indices) // geometry.frames_per_step)
        return steps, height // geometry.patch_size, width // geometry.patch_size


def sample(
    video: Any, geometry: QwenGeometry, settings: VideoSettings, wish: Wishes | None = None
) -> Sampled:
    """What is sampled from SGLang's ``VideoDecoderWrapper``, or of frames in its place.

    Args:
        wish: of its request, whose numbers are in the settings already.

    Raises:
        ValueError: a video with too few frames, or too long and narrow ones; or a wish for
            keyframes that the decoder cannot meet.

    Source: ``_read_video_torchcodec`` and ``fetch_video`` of qwen-vl-utils.
    """
    total, fps = length_and_rate(video)
    if isinstance(video, FrameArrays):  # all of them, and the last one once more to whole steps
        indices = list(range(total))
        total += -total % geometry.frames_per_step
        places = list(range(total))
    else:
        count = geometry.sampled_frames(total, fps, settings)
        indices = torch.linspace(0, total - 1, count).round().long().tolist()
        if wish is not None and wish.frames is not None:
            indices = keyframes.in_place_of(video, indices)
        places = indices  # of which Qwen3-VL's timestamps are made
    height, width = video.frame_shape
    size = geometry.resized(len(places), (width, height), settings)
    metadata = {
        "fps": fps,
        "duration": total / fps,
        "total_num_frames": total,
        "frames_indices": places,
        "video_backend": "torchcodec",
    }
    return Sampled(indices, size, metadata)


def resized(
    frames: torch.Tensor, size: tuple[int, int], *, exact: bool, anywhere: bool = False
) -> torch.Tensor:
    """Frames ``[n, 3, height, width]`` uint8 after a bicubic resize with antialiasing.

    Args:
        frames: ``[n, height, width, 3]`` uint8.
        size: width and height.
        exact: as qwen-vl-utils resizes, in fp32; or as transformers' video processors do, in
            PyTorch's kernel for uint8, which rounds between the passes and takes a twentieth of the
            time.
        anywhere: in place of that kernel, which is there on the CPU alone, its arithmetic on the
            device of the frames.
    """
    frames, target = frames.permute(0, 3, 1, 2), [size[1], size[0]]
    if list(frames.shape[2:]) == target:
        return frames
    if not exact and anywhere:
        return bicubic(frames, size)
    if not exact:
        return interpolate(frames, target, mode="bicubic", antialias=True)
    few = max(1, _PIXELS_AT_ONCE // (frames.shape[2] * frames.shape[3]))
    parts = [
        resize(part, target, InterpolationMode.BICUBIC, antialias=True)
        for part in frames.split(few)
    ]
    return torch.cat(parts)


class Patcher:
    """Writes slices of a video into the vision tower's input.

    Args:
        out: of this video, a step ``[patches, 3 * frames_per_step * patch_size²]``.
        sampled: the video.
        normalization: see :func:`normalization`.
        exact: see :func:`resized`.
        device: on which the work is done; None = the CPU.
    """

    def __init__(
        self,
        out: ClipBuffer,
        sampled: Sampled,
        geometry: QwenGeometry,
        normalization: tuple[torch.Tensor, torch.Tensor],
        *,
        exact: bool,
        device: PixelDevice | None = None,
    ) -> None:
        self._size, self._exact, self._device = sampled.size, exact, device
        self._mean, self._std = (
            one if device is None else one.to(device.device) for one in normalization
        )
        _, rows, columns = sampled.grid(geometry)
        merge, patch = geometry.merge_size, geometry.patch_size
        self._per_step = geometry.frames_per_step
        self._cut = (rows // merge, merge, patch, columns // merge, merge, patch)
        self._out = out

    def __call__(self, start: int, frames: torch.Tensor) -> None:
        """See :data:`~pevlm_sglang.media.slices.Work`; ``start`` begins a step."""
        if self._device is None:
            self._part(start, frames)
            return
        height, width = frames.shape[1:3]
        each = frame_bytes((width, height), self._size, exact=self._exact)
        self._device.work(
            frames, each, self._per_step, lambda at, part: self._part(start + at, part)
        )

    def _part(self, start: int, frames: torch.Tensor) -> None:
        with stage("resize"):
            pixels = resized(
                frames, self._size, exact=self._exact, anywhere=self._device is not None
            )
        with stage("process"):
            self._write(start, pixels)

    def _write(self, start: int, pixels: torch.Tensor) -> None:
        if missing := -len(pixels) % self._per_step:  # of a video's last step
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        for at, step in enumerate(pixels.split(self._per_step), start // self._per_step):
            self._out.step(at).copy_(self._patches(step))
            self._out.note(at, step)

    def _patches(self, step: torch.Tensor) -> torch.Tensor:
        """``[patches, dim]`` fp32 of a step's frames ``[n, 3, height, width]``, in the order of
        transformers' ``Qwen2VLVideoProcessor.patchify``."""
        cut = step.unflatten(3, self._cut[3:]).unflatten(2, self._cut[:3])
        cut = cut.permute(
            2, 5, 3, 6, 1, 0, 4, 7
        )  # patches: place, inside it; channel, frame, pixel
        values = torch.empty(cut.shape, dtype=torch.float32, device=step.device).copy_(cut)
        values = values.view(*cut.shape[:5], -1)
        values.sub_(self._mean[:, None]).div_(self._std[:, None])
        return values.flatten(4).flatten(0, 3)


def frame_bytes(before: tuple[int, int], after: tuple[int, int], *, exact: bool) -> int:
    """Of memory that a frame and the work on it take on a device.

    Args:
        before, after: width and height.
        exact: see :func:`resized`.
    """
    source, result = before[0] * before[1], after[0] * after[1]
    work = 5 * source + 10 * result if exact else work_bytes(before, after)  # fp32 and its copy
    return 3 * (source + work + 12 * result)  # patches in fp32, and before that in their order


def normalization(video_processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is subtracted from a uint8 pixel, and what it is then divided by, ``[3]`` fp32 each.

    Source: ``rescale_and_normalize`` of transformers' image processors, which fuses the two.
    """
    mean, std = torch.zeros(3), torch.ones(3)
    if video_processor.do_normalize:
        mean = torch.tensor(video_processor.image_mean)
        std = torch.tensor(video_processor.image_std)
    scale = 1.0 / video_processor.rescale_factor if video_processor.do_rescale else 1.0
    return mean * scale, std * scale


def clip_buffer(
    sampled: Sampled, geometry: QwenGeometry, dtype: torch.dtype, length: int, room: Room
) -> ClipBuffer:
    """For the vision tower's input of a video.

    Args:
        length, room: see :class:`~pevlm_sglang.media.clips.ClipBuffer`.
    """
    steps, rows, columns = sampled.grid(geometry)
    dim = 3 * geometry.frames_per_step * geometry.patch_size**2
    return ClipBuffer(steps, (rows * columns, dim), dtype, length, room)
