"""The frame rate is part of a video's identity.

Prefix caching knows a video by a hash of its features. The same frames at another rate have other
positions, and so another KV.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from pevlm_sglang.seams import wrap


def install() -> None:
    """Tell videos apart by their frame rate too. Runs in the launcher and in the scheduler.

    Raises:
        UnsupportedError: this SGLang lacks the seam.
    """
    from sglang.srt.managers.schedule_batch import MultimodalDataItem

    wrap(MultimodalDataItem, "set_pad_value", _hash_frame_rate, parameters=("self",))


def _hash_frame_rate(set_pad_value: Callable[..., Any]) -> Callable[..., Any]:
    def corrected(self: Any) -> None:
        known = self.pad_value is not None
        set_pad_value(self)
        seconds = self.model_specific_data.get("second_per_grid_ts")
        if known or seconds is None:
            return
        rates = [float(second) for second in seconds]
        digest = hashlib.sha256(f"{self.hash}:{rates}".encode()).digest()
        self.set_hash(int.from_bytes(digest[:8], "big"))

    return corrected
