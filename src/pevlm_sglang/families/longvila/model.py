"""LongVILA: SigLIP, a projector that merges 2×2 patches, and Qwen2.

The architecture is VILA's (``LlavaLlamaModel``); LongVILA is VILA trained on 256 frames a video.
Source: github.com/NVlabs/VILA, ``llava/model/multimodal_projector/base_projector.py`` and
``llava/model/multimodal_encoder/{vision_encoder,siglip_encoder}.py``. Written on SGLang's own
layers, like sglang/srt/models/nvila.py.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.managers.mm_utils import (
    MultiModalityDataPaddingPatternMultimodalTokens,
    general_mm_embed_routine,
)
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.siglip import SiglipVisionModel
from sglang.srt.utils import add_prefix
from torch import nn

from pevlm_sglang.families.longvila.checkpoint import ARCHITECTURE, WEIGHT_FILES, VilaConfig

FRAMES_PER_FORWARD = 64
"""Frames that the tower takes at once: its activations stay small beside the model."""

_TOWER_ACTIVATIONS = {
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "gelu": nn.GELU,
}
_QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}


class Downsample(nn.Module):
    """Concatenate squares of ``rate × rate`` patches, padded with zeros below and to the right.

    ``[frames, side², channels]`` → ``[frames, ceil(side / rate)², rate² × channels]``
    """

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames, patches, channels = x.shape
        rate, side = self.rate, int(patches**0.5)
        x = x.view(frames, side, side, channels)
        x = F.pad(x, (0, 0, 0, -side % rate, 0, -side % rate))
        side = x.shape[1] // rate
        x = x.view(frames, side, rate, side, rate, channels).transpose(2, 3)
        return x.reshape(frames, side * side, rate * rate * channels)


class Projector(nn.Module):
    """``mm_projector/``; the indices of ``layers`` are those of the published weights."""

    def __init__(self, config: VilaConfig) -> None:
        super().__init__()
        channels, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        rate = config.downsample
        wide = rate * rate * channels
        layers: list[nn.Module] = [Downsample(rate), nn.LayerNorm(wide)]
        if rate == 3:
            middle = 3 * channels
            layers += [nn.Linear(wide, middle), nn.GELU(), nn.LayerNorm(middle)]
            wide = middle
        layers += [nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.layers(x)
        return projected


class LlavaLlamaModel(nn.Module):
    """LongVILA, under the name that its checkpoints give it."""

    allow_patterns_overrides = [WEIGHT_FILES]  # noqa: RUF012

    def __init__(
        self,
        config: VilaConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _tower(config, add_prefix("vision_tower", prefix))
        self.mm_projector = Projector(config)
        self.llm = Qwen2ForCausalLM(
            config.text_config, quant_config=quant_config, prefix=add_prefix("llm", prefix)
        )
        self._padding = MultiModalityDataPaddingPatternMultimodalTokens()

    def pad_input_ids(self, input_ids: array[int], mm_inputs: MultimodalInputs) -> array[int]:
        padded: array[int] = self._padding.pad_input_tokens(input_ids, mm_inputs)
        return padded

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.llm.get_input_embeddings()
        return embeddings

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """``[frames × tokens_per_frame, hidden]`` features of images and of videos' frames."""
        weight = self.mm_projector.layers[1].weight
        features = []
        for item in items:
            for frames in torch.as_tensor(item.feature).split(FRAMES_PER_FORWARD):
                frames = frames.to(device=weight.device, dtype=weight.dtype)
                vision = self.vision_tower.vision_model
                hidden = vision.encoder(vision.embeddings(frames))
                features.append(self.mm_projector(hidden).flatten(0, 1))
        return torch.cat(features)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        get_embedding: bool = False,
    ) -> Any:
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.llm,
            data_embedding_funcs={
                Modality.IMAGE: self.get_image_feature,
                Modality.VIDEO: self.get_image_feature,
            },
            get_embedding=get_embedding,
            positions=positions,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the three directories; their weights are told apart by name.

        Raises:
            ValueError: the tower or the projector lacks a weight, or has one of another name.
        """
        wanted = dict(self.named_parameters())
        wanted = {n: p for n, p in wanted.items() if n.startswith(("vision_tower", "mm_projector"))}
        missing = set(wanted) - _UNUSED

        def language_model() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if name.startswith("vision_model."):
                    missing.discard(self._load_tower(f"vision_tower.{name}", weight, wanted))
                elif name.startswith("layers."):
                    name = f"mm_projector.{name}"
                    _load(wanted, name, weight)
                    missing.discard(name)
                else:
                    yield name, weight

        self.llm.load_weights(language_model())
        if missing:
            raise ValueError(f"{ARCHITECTURE}: expected weights {sorted(missing)}, got none")

    def _load_tower(self, name: str, weight: torch.Tensor, wanted: dict[str, nn.Parameter]) -> str:
        """Load a weight of the tower; those of layers that the features do not pass are skipped."""
        *_, module, _ = name.split(".")
        if ".head." in name or name in _UNUSED or _layer(name) >= self.config.tower_layers:
            return name
        if module in _QKV:
            name = name.replace(module, "qkv_proj")
            _load(wanted, name, weight, _QKV[module])
        else:
            name = name.replace("self_attn.out_proj", "self_attn.proj")
            _load(wanted, name, weight)
        return name


_UNUSED = {f"vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")}
"""Of the tower's own output, which VILA does not take."""


def _tower(config: VilaConfig, prefix: str) -> SiglipVisionModel:
    """The tower up to the layer whose output VILA takes."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers = config.tower_layers
    return SiglipVisionModel(
        vision_config,
        prefix=prefix,
        act_layer=_TOWER_ACTIVATIONS[vision_config.hidden_act],
        flatten_batch=False,  # each frame attends to itself alone
    )


def _layer(name: str) -> int:
    """The number of the tower's layer that a weight belongs to; -1 for the embeddings."""
    _, found, rest = name.partition(".encoder.layers.")
    return int(rest.split(".")[0]) if found else -1


def _load(wanted: dict[str, nn.Parameter], name: str, weight: torch.Tensor, *shard: str) -> None:
    if name not in wanted:
        raise ValueError(f"{ARCHITECTURE}: expected no weight {name}")
    parameter = wanted[name]
    getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight, *shard)
