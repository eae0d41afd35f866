"""An SGLang plugin that gives a server one fault, for the soak to find.

The environment variable ``PEVLM_TEST_FAULT`` names it, a key of ``FAULTS``. What goes wrong depends
on what else goes on: a question that is asked alone, on an empty cache, is answered right.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

VARIABLE = "PEVLM_TEST_FAULT"
EVERY = 10  # requests with a sparse layout, one of which is off


def register() -> None:
    """Entry point ``sglang.srt.plugins``."""
    FAULTS[os.environ[VARIABLE]]()


def _one_step_off() -> None:
    """Every boundary of one request in ten lies a step late."""
    from pevlm_sglang import requests
    from support.broken_masks import BREAKAGES

    on_queued, numbers = requests.on_queued, count(1)

    def broken(req: Any, rule: Any, *args: Any) -> None:
        on_queued(req, rule, *args)
        laid_out: Any = getattr(req.multimodal_inputs, "pevlm", None)
        sparse = laid_out is not None and laid_out.dense_reason is None
        if sparse and next(numbers) % EVERY == 0:
            layout = BREAKAGES["a step late"](req, rule, laid_out.layout)
            req.multimodal_inputs.pevlm = replace(laid_out, layout=layout)

    setattr(requests, "on_queued", broken)  # noqa: B010 (mypy allows no assignment)


def _namespace_dropped() -> None:
    """Settings share their keys and values."""
    from pevlm_sglang import requests

    on_created = requests.on_created

    def broken(req: Any, server_config: Any) -> None:
        extra_key = req.extra_key
        on_created(req, server_config)
        req.extra_key = extra_key

    requests.on_created = broken


def _embeddings_of_the_neighbour() -> None:
    """Where two videos are equally long, the one that was looked up before."""
    from pevlm_sglang.media.embeddings import CacheView

    note = CacheView._note
    before: dict[Any, Any] = {}

    def broken(self: Any, key: int, result: Any) -> Any:
        result = note(self, key, result)
        if result is None:
            return None
        shape = result.embedding.shape
        neighbour, before[shape] = before.get(shape, result), result
        return neighbour

    setattr(CacheView, "_note", broken)  # noqa: B010 (mypy allows no assignment)


FAULTS: dict[str, Callable[[], None]] = {
    "one step off": _one_step_off,
    "namespace dropped": _namespace_dropped,
    "embeddings of the neighbour": _embeddings_of_the_neighbour,
}
"""Name → puts it in place."""
