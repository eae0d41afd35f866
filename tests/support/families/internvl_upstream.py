"""SGLang's own vision tower and projector of InternVL, in a process of its own and no server.

``python -m support.families.internvl_upstream MODEL TILES OUT``: TILES and OUT are files of
``torch.save``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from support.server import DEFAULT_ENV


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
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(model), *map(str, paths)],
            env={**os.environ, **DEFAULT_ENV},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
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
