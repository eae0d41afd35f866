"""Hugging Face's own model under the dense mask: what a PEVLM server has to answer.

Nothing here comes from the code under test, nor from SGLang: frames are decoded and sampled by the
tests, steps are found in the token stream, and the mask is written from the definition. A family's
oracle is a subclass, in ``support.families``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.spec_mask import Steps, spec_mask

IMAGE_RUN_GAP = 32  # tokens between neighbouring images of one run, at most


@dataclass(frozen=True)
class Setting:
    """A sink and block size in sampled frames; None is full attention.

    Attributes:
        image_runs: whether images close to each other count as a video, one image a step.
    """

    sink_frames: int
    block_frames: int
    image_runs: bool = False


class Oracle(ABC):
    """Log-probabilities of a family's reference model in fp32 on the CPU.

    Attributes:
        frames_per_step: sampled frames that the vision tower merges into one step.
    """

    frames_per_step: int = 1

    @abstractmethod
    def inputs(self, prompt: str, videos: Sequence[Path], images: Sequence[Any] = ()) -> Any:
        """What the reference's processor makes of a prompt with one placeholder a video or image:
        a mapping with ``input_ids`` ``[1, length]`` and whatever :meth:`logits` needs."""

    @abstractmethod
    def videos(self, inputs: Any) -> list[Steps]:
        """The steps of each video, found in the token stream; they tile it."""

    def images(self, inputs: Any) -> list[tuple[int, int]]:
        """The token range of each image."""
        raise NotImplementedError

    @abstractmethod
    def logits(self, inputs: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``[length, vocabulary]`` logits of the reference model.

        Args:
            inputs: see :meth:`inputs`.
            ids: ``[length]`` int64, of the prompt and of the answer.
            mask: ``[1, 1, length, length]`` fp32, added to the attention scores of the language
                model.
        """

    def mask(self, inputs: Any, setting: Setting | None, length: int) -> np.ndarray:
        """``[length, length]`` bool: which token ``q`` attends to which token ``k``.

        Args:
            inputs: see :meth:`inputs`.
            setting: see :meth:`logprobs`.
            length: tokens of the prompt and of the answer.
        """
        videos: list[Steps] = []
        frames_per_step: list[int] = []
        if setting:
            videos = self.videos(inputs)
            frames_per_step = [self.frames_per_step] * len(videos)
        if setting and setting.image_runs:
            runs = _image_runs(self.images(inputs), [video[0][0] for video in videos])
            videos, frames_per_step = videos + runs, frames_per_step + [1] * len(runs)
        order = sorted(range(len(videos)), key=lambda i: videos[i][0])
        sink, block = (setting.sink_frames, setting.block_frames) if setting else (0, 1)
        return spec_mask(
            length,
            [videos[i] for i in order],
            sink_steps=[-(-sink // frames_per_step[i]) for i in order],
            block_steps=[-(-block // frames_per_step[i]) for i in order],
        )

    def logprobs(
        self, inputs: Any, setting: Setting | None, answer: Sequence[int] = ()
    ) -> torch.Tensor:
        """``[prompt + answer, vocabulary]`` fp32 log-probabilities of the next token.

        Args:
            inputs: see :meth:`inputs`.
            setting: of PEVLM, or None for full attention.
            answer: generated tokens that follow the prompt.
        """
        ids = torch.cat([inputs["input_ids"][0], torch.tensor(answer, dtype=torch.int64)])
        mask = _additive(self.mask(inputs, setting, len(ids)))
        with torch.no_grad():
            logits = self.logits(inputs, ids, mask)
        return logits.float().log_softmax(dim=-1)


def _image_runs(images: Sequence[tuple[int, int]], video_starts: Sequence[int]) -> list[Steps]:
    """Images in prompt order, those close to each other together. A gap holds text alone, so a
    video between two images ends the run."""
    runs: list[list[tuple[int, int]]] = []
    for start, end in images:
        last = runs[-1][-1][1] if runs else -IMAGE_RUN_GAP - 1
        if start - last <= IMAGE_RUN_GAP and not any(last <= v < start for v in video_starts):
            runs[-1].append((start, end))
        else:
            runs.append([(start, end)])
    return [*runs]


def _additive(mask: np.ndarray) -> torch.Tensor:
    allowed = torch.from_numpy(mask)[None, None]
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
