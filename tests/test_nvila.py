"""NVILA's mended processor, with a stand-in for transformers': the published one is remote code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pevlm_sglang import processors
from support.families.longvila import IMAGE, VIDEO, sample
from support.tiny import write_tokenizer
from support.video import write_video

pytest.importorskip("sglang")
TOKENS = 4  # a frame, without the newline


class StandIn:
    """Takes and gives what NVILA's own processor does: frames in, a run of placeholders and a
    newline a frame out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *, text: Any, videos: Any = (), **settings: Any) -> dict[str, Any]:
        assert settings["do_sample_frames"] is False
        ids: list[int] = []
        clips = iter(videos)
        (prompt,) = text
        for token in self.tokenizer(prompt).input_ids:
            if token == self.tokenizer.video_token_id:
                for _ in next(clips):
                    ids += [token] * TOKENS + self.tokenizer("\n").input_ids
            else:
                ids.append(token)
        frames = np.concatenate([np.stack(clip) for clip in videos])
        return {
            "input_ids": torch.tensor([ids]),
            "pixel_values_videos": torch.from_numpy(frames),
        }


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("clips")
    return [
        write_video(base / f"{seconds}.mp4", seconds=seconds, size=(112, 84), seed=seconds)
        for seconds in (6, 1)
    ]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([IMAGE, VIDEO], special_tokens=True)
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        setattr(tokenizer, f"{kind}_token", token)
        setattr(tokenizer, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    return StandIn(tokenizer)


@contextmanager
def processing(
    stand_in: StandIn, processor_class: type, video: dict[str, Any]
) -> Iterator[Callable[..., Any]]:
    from sglang.srt.runtime_context import get_context

    config = SimpleNamespace(
        image_token_id=stand_in.tokenizer.image_token_id,
        video_token_id=stand_in.tokenizer.video_token_id,
    )
    with get_context().override_server_args(
        device="cpu", mm_process_config={"video": video}
    ) as server_args:
        processor: Any = processor_class(
            config, server_args, stand_in, "default", skip_mm_pool=True
        )

        def run(prompt: str, videos: Any) -> Any:
            request = SimpleNamespace(image_data=None, video_data=videos)
            return asyncio.run(processor.process_mm_data_async(None, None, prompt, request))

        yield run
        processor.io_executor.shutdown()


@pytest.fixture
def mended() -> type:
    [cls] = {
        processors.for_architectures(object, [name], with_pevlm=pevlm)
        for name in ("NVILAForConditionalGeneration", "NVILALiteForConditionalGeneration")
        for pevlm in (True, False)
    }
    assert isinstance(cls, type)
    return cls


def test_videos_reach_the_model(stand_in: StandIn, mended: type, clips: list[Path]) -> None:
    """Eight frames a video, as SGLang meant to; those of the short one repeat."""
    with processing(stand_in, mended, {}) as run:
        out = run(f"One {VIDEO} two {VIDEO}", [str(clip) for clip in clips])
    expected = np.stack([np.asarray(f) for clip in clips for f in sample(clip, 8)])
    features = torch.cat([item.feature for item in out.mm_items])
    assert np.array_equal(features.numpy(), expected)
    offsets = [offset for item in out.mm_items for offset in item.offsets]
    assert len(offsets) == 16
    assert {end - start + 1 for start, end in offsets} == {TOKENS}


def test_number_of_frames(stand_in: StandIn, mended: type, clips: list[Path]) -> None:
    with processing(stand_in, mended, {"num_frames": 5, "max_frames": 6}) as run:

        def frames(**wishes: Any) -> int:
            out = run(VIDEO, [{"url": str(clips[0]), **wishes}])
            return sum(len(item.feature) for item in out.mm_items)

        assert [frames(), frames(max_frames=6), frames(fps=0.5)] == [5, 6, 3]
        with pytest.raises(ValueError, match="max_frames: expected at most 6"):
            frames(max_frames=7)


def test_sglang_s_own_fails(stand_in: StandIn, clips: list[Path]) -> None:
    """When it no longer does, the mend can go."""
    from sglang.srt.multimodal.processors.nvila import NVILAMultimodalProcessor

    with (
        processing(stand_in, NVILAMultimodalProcessor, {}) as run,
        pytest.raises(AttributeError, match="asnumpy"),
    ):
        run(VIDEO, [str(clips[0])])
