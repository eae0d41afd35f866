"""The one table of model families: architecture → spans, sizes, processor, model.

From it are made the launch check, ``pevlm show``, the support table of the documentation and the
tests. A family joins with a folder, whose ``__init__`` has a :class:`Family`, and a line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.families.family import Family
from pevlm_sglang.families.internvl import INTERNVL
from pevlm_sglang.families.llava_video import LLAVA_VIDEO
from pevlm_sglang.families.longvila import LONGVILA
from pevlm_sglang.families.qwen_vl import QWEN2_VL, QWEN3_VL
from pevlm_sglang.families.refused import REASONS
from pevlm_sglang.families.sizes import Geometry, read_json
from pevlm_sglang.families.spans import SpanRule

FAMILIES: tuple[Family, ...] = (QWEN2_VL, QWEN3_VL, INTERNVL, LLAVA_VIDEO, LONGVILA)


def family_of(architectures: Iterable[str] | None) -> Family:
    """The family of a model with these architectures (of ``config.json``).

    Raises:
        UnsupportedError: no family knows them; says why where that is known.
    """
    names = tuple(architectures or ())
    if (family := _find(names)) is not None:
        return family
    known = ", ".join(name for family in FAMILIES for name in family.checkpoints)
    reasons = (REASONS.get(name) for name in names)
    reason = next(filter(None, reasons), "it cannot tell where the frames of a video lie")
    raise UnsupportedError(
        f"model architecture {', '.join(names) or 'unknown'}: PEVLM does not serve it: "
        f"{reason}; supported: {known}"
    )


def _find(names: Iterable[str]) -> Family | None:
    return next((f for f in FAMILIES if any(name in f.checkpoints for name in names)), None)


def span_rule(hf_config: Any) -> SpanRule:
    """How the frames of a model are found.

    Raises:
        UnsupportedError: see :func:`family_of`, and a model that its family does not serve.
    """
    spans = family_of(hf_config.architectures).spans
    return SpanRule(spans, spans.frames_per_step(hf_config))


# --- What a video becomes ---------------------------------------------------------------------


def published() -> dict[str, Geometry]:
    """The published checkpoints of each family, by a name for the command line."""
    return {
        name: geometry for family in FAMILIES for name, geometry in family.sizes.PUBLISHED.items()
    }


def setting_names() -> list[str]:
    """The video settings of a server that take effect in some family."""
    return sorted({name for family in FAMILIES for name in family.names()[0]})


def of_checkpoint(directory: Path) -> Geometry:
    """The geometry of a checkpoint; its weights are not needed.

    Raises:
        ValueError: a file that is missing or broken, or settings that are not known here.
    """
    config = read_json(directory / "config.json")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures: expected names in a list, got {str(names)[:50]}")
    family = family_of(names)
    return family.sizes.of_checkpoint(config, directory)


# --- The launch -------------------------------------------------------------------------------


def read_checkpoints() -> None:
    """Teach this process to read the checkpoints that SGLang alone cannot."""
    for family in FAMILIES:
        if (read := family.load("read_checkpoint")) is not None:
            read()


def check_launch(hf_config: Any, video_config: Mapping[str, Any]) -> None:
    """Refuse video settings of a server before it starts, as far as the processor can tell.

    Args:
        hf_config: of the model.
        video_config: the ``video`` section of SGLang's ``--mm-process-config``.

    Raises:
        UnsupportedError: an unknown name, or a bad value.
    """
    try:
        family_of(hf_config.architectures).load("processor").check_launch(hf_config, video_config)
    except ValueError as error:
        raise UnsupportedError(f"--mm-process-config: {error}") from None


def processor_class(upstream: type | None, hf_config: Any) -> type:
    """The multimodal processor of a model, where SGLang would take ``upstream``.

    Raises:
        UnsupportedError: that is not SGLang's own: without ours, the video is not what this server
            says it is.
    """
    family = family_of(hf_config.architectures)
    return _ours("multimodal processor", family, family.load("processor"), upstream)


def model_class(upstream: type, architecture: str) -> type:
    """The model class of an architecture: this plugin's, or ``upstream`` where it has none, as of
    most families and of every draft.

    Raises:
        UnsupportedError: a class that is not SGLang's own.
    """
    family = _find([architecture])
    if family is None or family.model is None:
        return upstream
    return _ours("model", family, family.load("model"), upstream)


def register_model(architectures: Iterable[str] | None) -> None:
    """Put a model of this plugin that SGLang lacks into its registry, once it is about to be
    loaded. Not earlier: SGLang's registry imports every model that it has."""
    from sglang.srt.models.registry import ModelRegistry

    family = _find(tuple(architectures or ()))
    if family is not None and family.model is not None:
        for name in family.architectures:
            ModelRegistry.models.setdefault(name, family.load("model"))


def _ours(what: str, family: Family, ours: type, upstream: type | None) -> type:
    if upstream is None or issubclass(ours, upstream):
        return ours
    raise UnsupportedError(
        f"{' or '.join(family.architectures)}: expected SGLang's own {what}, got "
        f"{upstream.__module__}.{upstream.__name__}; leave out what put it there, or serve without "
        "--attention-backend pevlm"
    )


def offer_chat_template(family: Family, model_path: str) -> None:
    """Make SGLang choose the chat template of a model that it does not know by its path.

    ``--chat-template`` takes precedence.
    """
    if (template := family.chat_template) is None:
        return
    from sglang.srt.parser.conversation import matching_function_registry

    # First, because SGLang's own look for other models' names anywhere in the path.
    matching_function_registry.insert(0, lambda path: template if path == model_path else None)
