"""What SGLang's own classes make of a Qwen3-VL request, in a process of its own and no server.

``python -m support.families.qwen3_vl_upstream MODEL REQUESTS OUT``: REQUESTS is a JSON list of
objects with ``text``, ``videos`` and ``images``; OUT is a list of mappings, for ``torch.load``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from support.clips import whole
from support.isolated import run_module

VIDEO_CONFIG = {"min_pixels": 3136}  # of SGLang's first resize, which then leaves small clips alone


def run(model: Path, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Each request as SGLang's processor and vision tower see it.

    Args:
        model: directory of the checkpoint.
        requests: ``text``, with a placeholder for each of ``videos`` and ``images`` (paths).

    Returns:
        A mapping a request: ``input_ids`` ``[length]``, ``positions`` ``[3, length]``, and of each
        kind that it has, ``pixels_video`` ``[patches, values]``, ``grid_video`` ``[n, 3]`` and
        ``features_video`` ``[tokens, hidden × (1 + levels)]``, the tower's output beside that of
        each deepstack level; ``…_image`` likewise.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.pt"
        run_module(__name__, str(model), json.dumps(list(requests)), str(out))
        answers: list[dict[str, torch.Tensor]] = torch.load(out)
        return answers


def main(model: str, requests: str, out: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    with _sglang() as server_args, torch.no_grad():
        processor = _processor(model, config, server_args)
        tower = _tower(Path(model), config)
        answers = [
            asyncio.run(_answer(processor, tower, request)) for request in json.loads(requests)
        ]
    torch.save(answers, out)


@contextmanager
def _sglang() -> Iterator[Any]:
    """SGLang's global state, as for one rank without a group."""
    from sglang.srt import distributed
    from sglang.srt.runtime_context import get_context, get_parallel

    with (
        tempfile.NamedTemporaryFile() as store,
        get_context().override_server_args(mm_process_config={"video": VIDEO_CONFIG}) as args,
        get_parallel().override(tp_rank=0, attn_tp_rank=0, pp_rank=0),
    ):
        distributed.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{store.name}",
            backend="gloo",
        )
        distributed.initialize_model_parallel()
        yield args


def _processor(model: str, config: Any, server_args: Any) -> Any:
    from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
    from sglang.srt.utils.hf_transformers_utils import get_processor

    from pevlm_sglang.families import registry

    kind: Any = registry.processor_class(QwenVLImageProcessor, config)
    return kind(config, server_args, get_processor(model), None, skip_mm_pool=True)


def _tower(model: Path, config: Any) -> Any:
    from safetensors.torch import load_file
    from sglang.srt.models.qwen3_vl import Qwen3VLMoeVisionModel

    tower = Qwen3VLMoeVisionModel(config.vision_config)
    weights = {
        name.removeprefix("model.visual.").replace("attn.qkv.", "attn.qkv_proj."): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if name.startswith("model.visual.")
    }
    assert tower.load_weights(weights.items()) == set(dict(tower.named_parameters()))
    return tower


async def _answer(
    processor: Any, tower: Any, request: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    asked = SimpleNamespace(video_data=request["videos"], audio_data=None, rid="0")
    output = await processor.process_mm_data_async(
        image_data=request["images"], input_text=request["text"], request_obj=asked
    )
    answer = {
        "input_ids": torch.tensor(output.input_ids),
        "positions": output.mrope_positions,
    }
    for kind in ("video", "image"):
        items = [item for item in output.mm_items if item.modality.name.lower() == kind]
        if items:
            pixels = torch.cat([item.feature for item in items])
            cut = torch.cat([item.model_specific_data[f"{kind}_grid_thw"] for item in items])
            grid = torch.tensor([video.grid for video in whole(items)]) if kind == "video" else cut
            answer |= {
                f"pixels_{kind}": pixels,
                f"grid_{kind}": grid,
                f"features_{kind}": tower(pixels, cut),
            }
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:])
