"""The numeric type in which pixels travel from a processor to the vision tower."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.runtime_context import get_model


def tower_dtype(hf_config: Any) -> torch.dtype:
    """bfloat16 where the tower rounds its input to it anyway: half the bytes to send."""
    wanted = str(get_model().dtype)
    if wanted == "auto":
        wanted = str(getattr(hf_config, "dtype", None))
    return torch.bfloat16 if wanted.endswith("bfloat16") else torch.float32
