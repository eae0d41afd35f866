"""A plugin of SGLang for tests' own servers: how long each of a server's two loops is kept from its
work, in seconds of the processor, which do not grow when others use the machine.

``/server_info`` has the longest since it was last asked, under ``internal_states[0]["loops"]``:

- ``launcher``: between two turns of its event loop, on which the tokens of all streams go out.
- ``scheduler``: between two forwards, of which one more is a token more of each request. The vision
  tower and prefills are forwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

KEY = "loops"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


class _Watch:
    """Of this process's loop."""

    def __init__(self) -> None:
        self.longest, self.beating = 0.0, None
        self.since: float | None = None

    def turn(self) -> None:
        """The loop does what it is there for."""
        if self.since is not None:
            self.longest = max(self.longest, time.thread_time() - self.since)

    def take(self) -> float:
        longest, self.longest = self.longest, 0.0
        return longest

    async def beat(self) -> None:
        while True:
            self.since = time.thread_time()
            await asyncio.sleep(0.002)
            self.turn()


_watch: Any = _Watch()


def register() -> None:
    """SGLang's entry point, in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in {
        f"{_MANAGER}.get_internal_state": _of_launcher,
        f"{_SCHEDULER}.get_internal_state": _of_scheduler,
        f"{_SCHEDULER}.run_batch": _forward,
    }.items():
        HookRegistry.register(target, hook, HookType.AROUND)


async def _of_launcher(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _watch.beating is None:
        _watch.beating = asyncio.ensure_future(_watch.beat())
    states = await original(*args, **kwargs)
    states[0][KEY]["launcher"] = _watch.take()
    return states


def _of_scheduler(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = original(*args, **kwargs)
    output.internal_state[KEY] = {"scheduler": _watch.take()}
    return output


def _forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _watch.turn()
    result = original(*args, **kwargs)
    _watch.since = time.thread_time()
    return result
