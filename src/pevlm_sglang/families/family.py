"""What a model family says of itself. Each folder of ``families`` has one record; from the records
are made the registry, ``pevlm show``, the launch check, the support table and the tests."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pevlm_sglang.families.sizes import SizeRules
from pevlm_sglang.families.spans import SpanRules


@dataclass(frozen=True)
class Family:
    """A model family. What needs SGLang is named as ``module:name`` and loaded when it is needed.

    Attributes:
        name: of its folder.
        checkpoints: architecture (of ``config.json``) → the published checkpoints, in words.
        spans: its module ``spans``: where the frames lie in a prompt.
        sizes: its module ``sizes``: what a video becomes.
        corrections: architecture → what is computed otherwise than by SGLang alone, in words, for
            the log and ``/server_info``.
        processor: the class in place of SGLang's multimodal processor, or where SGLang has none.
        model: the class in place of SGLang's model, or where SGLang has none.
        read_checkpoint: called in every process of the server before a configuration is read.
        load_processor: in place of SGLang's ``get_processor``, which it is given.
        needless: called with the model's configuration: of its corrections, those that this release
            of SGLang makes needless, and that step aside.
        install_in_scheduler: called with the architecture before the model runs.
        chat_template: of SGLang's, for checkpoints whose own does not write placeholders.
        sent_by: how a request sends its video, in words.
        gpu_pixels: whether its processor can work on frames on a GPU.
    """

    name: str
    checkpoints: Mapping[str, str]
    spans: SpanRules
    sizes: SizeRules
    corrections: Mapping[str, tuple[str, ...]]
    processor: str
    model: str | None = None
    read_checkpoint: str | None = None
    load_processor: str | None = None
    install_in_scheduler: str | None = None
    needless: str | None = None
    chat_template: str | None = None
    sent_by: str = "`video_url`"
    gpu_pixels: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(self.checkpoints)

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The video settings of a server that take effect, and what a request may say itself."""
        geometry = next(iter(self.sizes.PUBLISHED.values()))
        return geometry.setting_names, (*geometry.limits(geometry.settings({})), "frames")

    def corrected(self, hf_config: Any) -> tuple[str, ...]:
        """What is corrected for a model, in words."""
        needless = self.load("needless")
        without = needless(hf_config) if needless is not None else ()
        return tuple(
            words
            for name in hf_config.architectures
            for words in self.corrections.get(name, ())
            if words not in without
        )

    def load(self, part: str) -> Any:
        """A part that is named as ``module:name``; None where the family has none."""
        target: str | None = getattr(self, part)
        return None if target is None else pkgutil.resolve_name(f"{__package__}.{target}")
