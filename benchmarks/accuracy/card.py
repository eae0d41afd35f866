"""Where the model and the results lie, and what a result was made with."""

from __future__ import annotations

import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import card as machine_card

MODEL = Path(__file__).parent / "model"
RESULTS = Path(__file__).parent / "results"


def card(model: Path, **more: Any) -> dict[str, Any]:
    """Versions, machine, the hash of the model's weights, and ``more``."""
    return {
        **machine_card(torch.device("cpu")),
        "qwen-vl-utils": version("qwen-vl-utils"),
        "weights_sha256": sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        **more,
    }
