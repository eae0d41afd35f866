"""SGLang's own vision tower of Qwen2-VL and Qwen2.5-VL, in a process of its own and no server.

``python -m support.families.qwen_vl_tower MODEL PIXELS OUT``: PIXELS and OUT are files of
``torch.save``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from support.isolated import run_module


def run(model: Path, pixels: torch.Tensor, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features ``[tokens, hidden]`` of some videos, ``corrected`` by this plugin and ``upstream``.

    Args:
        model: directory of the checkpoint.
        pixels: ``[patches, values]``
        grid: ``[videos, 3]``
    """
    with tempfile.TemporaryDirectory() as directory:
        paths = Path(directory, "pixels.pt"), Path(directory, "out.pt")
        torch.save((pixels, grid), paths[0])
        run_module(__name__, str(model), *map(str, paths))
        features: dict[str, torch.Tensor] = torch.load(paths[1])
        return features


def main(model: str, pixels: str, out: str) -> None:
    from sglang.srt import distributed
    from sglang.srt.runtime_context import get_context, get_parallel

    with (
        tempfile.NamedTemporaryFile() as store,
        get_context().override_server_args(model_path=model),
        get_parallel().override(tp_rank=0, attn_tp_rank=0, pp_rank=0),
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
        torch.save(_features(Path(model), *torch.load(pixels)), out)


def _features(model: Path, pixels: torch.Tensor, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    from sglang.srt.utils.hf_transformers_utils import get_config

    from pevlm_sglang.families.qwen_vl import tower as correction

    config = get_config(str(model), trust_remote_code=False)
    tower = _tower(model, config)
    features = {"upstream": tower(pixels, grid)}
    correction.install(config.architectures[0])
    return features | {"corrected": tower(pixels, grid)}


def _tower(model: Path, config: Any) -> Any:
    from safetensors.torch import load_file
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from sglang.srt.models.qwen2_vl import Qwen2VLForConditionalGeneration

    older = config.model_type == "qwen2_vl"
    kind = Qwen2VLForConditionalGeneration if older else Qwen2_5_VLForConditionalGeneration
    config.encoder_only = True  # no language model
    loaded = kind(config)
    loaded.load_weights(load_file(model / "model.safetensors").items())
    return loaded.visual


if __name__ == "__main__":
    main(*sys.argv[1:])
