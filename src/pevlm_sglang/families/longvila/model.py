"""LongVILA: SigLIP, a projector that merges 2×2 patches, and Qwen2.

The architecture is VILA's (``LlavaLlamaModel``); LongVILA is VILA trained on 256 frames a video.
Source: github.com/NVlabs/VILA, ``llava/model/multimodal_projector/base_projector.py`` and
``llava/model/multimodal_encoder/{vision_encoder,siglip_encoder}.py``. Written on SGLang's own
layers; the way of its features to the language model is NVILA's (sglang/srt/models/nvila.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.nvila import NVILAForConditionalGeneration
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.siglip import SiglipVisionModel
from sglang.srt.utils import add_prefix
from torch import nn
from transformers.activations import get_activation

from pevlm_sglang.families.longvila.checkpoint import ARCHITECTURE, WEIGHT_FILES, VilaConfig

FRAMES_PER_FORWARD = 64
"""Frames that the tower takes at once: its activations stay small beside the model."""


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


def _projector(config: VilaConfig) -> nn.Sequential:
    """The layers of ``mm_projector/``; their indices are those of the published weights."""
    channels, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    rate = config.geometry.merge_size
    wide = rate * rate * channels
    layers: list[nn.Module] = [Downsample(rate), nn.LayerNorm(wide)]
    if rate == 3:
        middle = 3 * channels
        layers += [nn.Linear(wide, middle), nn.GELU(), nn.LayerNorm(middle)]
        wide = middle
    return nn.Sequential(*layers, nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class LlavaLlamaModel(NVILAForConditionalGeneration):
    """LongVILA, under the name that its checkpoints give it."""

    allow_patterns_overrides = [WEIGHT_FILES]  # noqa: RUF012

    def __init__(
        self,
        config: VilaConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        nn.Module.__init__(self)  # NVILA's projector and tower are others
        self.config = config
        self.vision_tower = _tower(config, add_prefix("vision_tower", prefix))
        self.mm_projector = nn.ModuleDict({"layers": _projector(config)})
        self.llm = Qwen2ForCausalLM(
            config.text_config, quant_config=quant_config, prefix=add_prefix("llm", prefix)
        )

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.llm.get_input_embeddings()
        return embeddings

    @torch.no_grad()
    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """``[frames × tokens_per_frame, hidden]`` features of images and of videos' frames."""
        projector = self.mm_projector["layers"]
        weight = next(projector.parameters())
        features = []
        for item in items:
            for frames in torch.as_tensor(item.feature).split(FRAMES_PER_FORWARD):
                frames = frames.to(device=weight.device, dtype=weight.dtype)
                vision = self.vision_tower.vision_model
                hidden = vision.encoder(vision.embeddings(frames))
                features.append(projector(hidden).flatten(0, 1))
        return torch.cat(features)

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
                part = next(
                    (part for start, part in _PARTS.items() if name.startswith(start)), None
                )
                if part is None:
                    yield name, weight
                elif (place := self._place(part + name)) is not None:
                    name, shard = place
                    if name not in wanted:
                        raise ValueError(f"{ARCHITECTURE}: expected no weight {name}")
                    loader = getattr(wanted[name], "weight_loader", default_weight_loader)
                    loader(wanted[name], weight, *shard)
                    missing.discard(name)

        self.llm.load_weights(language_model())
        if missing:
            raise ValueError(f"{ARCHITECTURE}: expected weights {sorted(missing)}, got none")

    def _place(self, name: str) -> tuple[str, Sequence[str]] | None:
        """The parameter of a weight, and its shard; None where the features do not pass it."""
        layer = re.search(r"\.encoder\.layers\.(\d+)\.", name)
        beyond = layer is not None and int(layer[1]) >= self.config.tower_layers
        if beyond or ".head." in name or name in _UNUSED:
            return None
        if (shard := re.search(r"\.([qkv])_proj\.", name)) is not None:
            return name.replace(shard[0], ".qkv_proj."), shard[1]
        return name.replace("self_attn.out_proj", "self_attn.proj"), ()


_PARTS = {"vision_model.": "vision_tower.", "layers.": "mm_projector."}
"""How weights of the directories begin → the module that they are of."""

_UNUSED = {f"vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")}
"""Of the tower's own output, which VILA does not take."""


def _tower(config: VilaConfig, prefix: str) -> SiglipVisionModel:
    """The tower up to the layer whose output VILA takes."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers = config.tower_layers
    return SiglipVisionModel(
        vision_config,
        prefix=prefix,
        act_layer=partial(get_activation, vision_config.hidden_act),
        flatten_batch=False,  # each frame attends to itself alone
    )
