"""SGLang's own processor and vision tower of InternVL, without a server.

The tower runs in a process of its own, ``python -m support.families.internvl_upstream MODEL TILES
OUT``; TILES and OUT are files of ``torch.save``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pevlm_sglang.families.tile_layout import tile_layout
from support.isolated import run_module
from support.processor import Processor, sglang_processor


@contextmanager
def processor(
    model: Path, *, upstream: bool = False, pixels: bool = True, **options: Any
) -> Iterator[Processor]:
    """PEVLM's processor, or SGLang's own.

    Args:
        pixels: whether they matter; tiles are empty otherwise, since 300 frames are 700 MB.
    """
    from sglang.srt.configs.internvl import InternVLChatConfig
    from sglang.srt.multimodal.processors import internvl as upstream_module
    from transformers import AutoTokenizer

    from pevlm_sglang.families.internvl import processor as module

    def empty(picture: Any, size: int, most: int) -> torch.Tensor:
        columns, rows = tile_layout(picture.width, picture.height, size, most)
        return torch.zeros(columns * rows + (columns * rows > 1), 3, 1, 1)

    config = InternVLChatConfig.from_pretrained(model)
    kind = upstream_module.InternVLProcessor if upstream else module.PevlmInternVLProcessor
    with (
        mock.patch.object(upstream_module, "get_device", return_value="cpu"),
        mock.patch.object(module, "tiles_of", module.tiles_of if pixels else empty),
        sglang_processor(kind, config, AutoTokenizer.from_pretrained(model), **options) as found,
    ):
        yield found


def run(model: Path, tiles: torch.Tensor) -> list[torch.Tensor]:
    """What the tower makes of some tiles.

    Args:
        model: directory of the checkpoint.
        tiles: ``[n, 3, size, size]``

    Returns:
        ``[n, 1 + patches, hidden]`` before the first layer and after each, then the features as
        the language model gets them.
    """
    with tempfile.TemporaryDirectory() as directory:
        paths = Path(directory, "tiles.pt"), Path(directory, "out.pt")
        torch.save(tiles, paths[0])
        run_module(__name__, str(model), *map(str, paths))
        states: list[torch.Tensor] = torch.load(paths[1])
        return states


def main(model: str, tiles: str, out: str) -> None:
    from sglang.srt import distributed
    from sglang.srt.configs.internvl import InternVLChatConfig
    from sglang.srt.runtime_context import get_context, get_parallel

    with (
        tempfile.NamedTemporaryFile() as store,
        get_context().override_server_args(model_path=model),
        torch.no_grad(),
    ):
        distributed.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{store.name}",
            backend="gloo",
        )
        distributed.initialize_model_parallel()
        with get_parallel().override(tp_rank=0, attn_tp_rank=0, pp_rank=0):
            states = _states(Path(model), InternVLChatConfig.from_pretrained(model), tiles)
    torch.save(states, out)


def _states(model: Path, config: Any, tiles: str) -> list[torch.Tensor]:
    from safetensors.torch import load_file
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
    from sglang.srt.models.internvl import InternVLChatModel

    loaded = InternVLChatModel(config)
    loaded.load_weights(load_file(model / "model.safetensors").items())
    pixels = torch.load(tiles)
    tower = loaded.vision_model(pixels, output_hidden_states=True, return_dict=True)
    item = MultimodalDataItem(modality=Modality.VIDEO, feature=pixels)
    return [*tower.hidden_states, loaded.get_video_feature([item])]


if __name__ == "__main__":
    main(*sys.argv[1:])
