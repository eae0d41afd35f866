"""The recommended setting as a file that ``--pevlm-config`` takes, with where it comes from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pevlm_sglang.settings.config import PevlmConfig, resolve
from pevlm_sglang.tune.points import Setting

PRESET_FILE = "preset.yaml"

_PRECEDENCE = (
    "Precedence: defaults < this file < --pevlm-... flags < "
    'a request\'s custom_params={"pevlm": {...}}.'
)


def write_preset(
    path: Path, setting: Setting, *, command: str, figures: str, server: Mapping[str, Any]
) -> None:
    """Write a preset, and check that it says what it should.

    With the setting go the server's other options that change answers, where they are not the
    default.

    Args:
        path: of the file.
        setting: to serve.
        command: that measured it.
        figures: what was measured, as text.
        server: ``sweep.describe_server``.

    Raises:
        ValueError: it cannot be written, or does not load as the setting.
    """
    launch = ["python", "-m", "sglang.launch_server", "--model-path", server["model_path"]]
    launch += ["--attention-backend", "pevlm", "--pevlm-config", str(path)]
    if settings := server.get("mm_process_config"):
        launch += ["--mm-process-config", json.dumps(settings)]
    title = (
        "full attention unless a request asks for PEVLM" if setting.is_full else setting.in_words
    )
    header = [
        f"{title[0].upper()}{title[1:]}, chosen by pevlm tune for {server['model_path']}",
        f"on SGLang {server['sglang_version']}, {server['device']}, {server['dtype']}.",
        *("", f"  {shlex.join(launch)}"),
        *("", "Measured by", "", f"  {command}"),
        *("", *figures.splitlines(), "", _PRECEDENCE),
    ]
    lines = [line for text in header for line in text.splitlines() or [""]]
    defaults = PevlmConfig().describe()
    others = {name: server[f"pevlm_{name}"] for name in ("image_runs", "vision_fixes")}
    changed = {name: value for name, value in others.items() if value != defaults[name]}
    values = {**setting.options, **changed}
    options = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    if not setting.is_full:
        options[0] += " # sampled frames"
    commented = [f"# {line}".rstrip() for line in lines]
    try:
        path.write_text("\n".join([*commented, "", *options]) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    if resolve(path, {}) != PevlmConfig().override(values):
        raise ValueError(f"{path}: expected {values}, got another setting on reading it")
