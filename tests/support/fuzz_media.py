"""Broken media files through a family's processor, as a server's launcher runs it.

``python -m support.fuzz_media FAMILY MODEL`` is the worker: it reads paths from its standard input,
a line each, and says in JSON what became of each. :class:`Worker` is who asks it, and ends it where
it takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pevlm_sglang.settings.config import PevlmConfig
from support.isolated import TESTS
from support.server import DEFAULT_ENV

FAMILIES = ("qwen2_5_vl", "internvl", "llava_video", "longvila")
TIME_LIMIT = 20.0  # seconds a file
START_LIMIT = 180.0  # seconds until a worker is ready
ADDRESS_SPACE = 8 << 30  # bytes more than a worker has when it is ready
PEAK = 1 << 30  # bytes of memory that one file may take for a while: all are small
IMAGES = (".png", ".jpg", ".gif", ".webp", ".bmp", ".tiff")

REFUSED, ANSWERED = "refused", "answered"
ERROR, HANG, DEATH, GREEDY = "error", "hang", "death", "greedy"
GOOD = (REFUSED, ANSWERED)


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        kind: REFUSED (HTTP 400), ANSWERED, ERROR (HTTP 500), HANG, DEATH of the process, or GREEDY,
            which took more than ``PEAK`` bytes.
        detail: a message.
        peak, resident: bytes of the process, at most during the file and after it.
    """

    kind: str
    detail: str = ""
    peak: int = 0
    resident: int = 0


class Worker:
    """A worker process, started again where a file was its end.

    Args:
        family: one of ``FAMILIES``.
        model: directory of its tiny model.
    """

    def __init__(self, family: str, model: Path) -> None:
        self._command = [sys.executable, "-m", "support.fuzz_media", family, str(model)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def __call__(self, path: Path) -> Outcome:
        """What becomes of a file."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        line = self._line(TIME_LIMIT)
        if line:
            return Outcome(**json.loads(line))
        status = self._end()
        if line is None:
            return Outcome(HANG, f"no answer in {TIME_LIMIT:g} s")
        return Outcome(DEATH, f"status {status}")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=TESTS,
            env={**os.environ, **DEFAULT_ENV, "MALLOC_ARENA_MAX": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if not self._line(START_LIMIT):
            self._end()
            raise RuntimeError(f"did not start: {' '.join(self._command)}")

    def _line(self, timeout: float) -> str | None:
        """The next line; empty at the process's end, None after the time."""
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.readline() if selector.select(timeout) else None

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()
        return process.wait()


# --- The worker ----------------------------------------------------------------------------------


def _serve(family: str, model: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with PROCESSORS[family](model) as process:
        limit = _status("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        gc.freeze()  # or a collection looks through all that was imported
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_outcome(process, Path(line.rstrip("\n")))), file=answers, flush=True)


def _outcome(process: Callable[[list[str], list[str]], Any], path: Path) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    is_image = path.suffix in IMAGES
    try:
        output = process([] if is_image else [str(path)], [str(path)] if is_image else [])
        kind, detail = ANSWERED, check_output(output)
    except ValueError as error:
        kind, detail = REFUSED, str(error)[:300]
    except AssertionError as error:
        kind, detail = ERROR, f"wrong: {error}"
    except Exception as error:  # HTTP 500 of a server
        kind, detail = ERROR, f"{type(error).__name__}: {error}"[:600]
    peak = _status("VmHWM")
    if peak - before > PEAK and kind in GOOD:
        kind, detail = GREEDY, f"{(peak - before) >> 20} MiB: {kind}, {detail}"
    output = None
    gc.collect()
    return {"kind": kind, "detail": detail, "peak": peak, "resident": _status("VmRSS")}


def check_output(output: Any) -> str:
    """What a processor says of a sound file must fit together.

    Raises:
        AssertionError: says what does not.
    """
    import torch

    items = output.mm_items
    assert items, "no item"
    length = len(output.input_ids)
    for item in items:
        feature = torch.as_tensor(item.feature)
        assert feature.numel(), "no pixels"
        assert feature.float().isfinite().all(), "pixels that are no numbers"
        assert item.offsets, "no place in the prompt"
        assert all(0 <= start <= end < length for start, end in item.offsets), "outside the prompt"
    return f"{length} tokens"


def _status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


SMALL_CACHE: dict[str, Any] = {"media_cache_mb": 8}  # so that growth is a leak


@contextlib.contextmanager
def _qwen(model: Path) -> Iterator[Callable[..., Any]]:
    from sglang.srt.utils.hf_transformers.processor import get_processor
    from transformers import AutoConfig

    from pevlm_sglang.families.qwen_vl.processor import QwenVLProcessor
    from support.processor import sglang_processor

    config = AutoConfig.from_pretrained(model)
    few = {"min_pixels": 3136}
    made = sglang_processor(
        QwenVLProcessor, config, get_processor(str(model)), video=few, pevlm=SMALL_CACHE
    )
    with made as found:
        yield _asking(
            found,
            "<|vision_start|><|video_pad|><|vision_end|>",
            "<|vision_start|><|image_pad|><|vision_end|>",
        )


@contextlib.contextmanager
def _internvl(model: Path) -> Iterator[Callable[..., Any]]:
    from support.families.internvl import IMAGE, VIDEO
    from support.families.internvl_upstream import processor

    with processor(model, video={"num_frames": 4}, pevlm=SMALL_CACHE) as found:
        yield _asking(found, VIDEO, IMAGE)


def _asking(processor: Any, video: str, image: str) -> Callable[..., Any]:
    def ask(videos: list[str], images: list[str]) -> Any:
        return processor(f"{video * len(videos)}{image * len(images)}What?", videos, images)

    return ask


@contextlib.contextmanager
def _llava_video(model: Path) -> Iterator[Callable[..., Any]]:
    from sglang.srt.utils.hf_transformers_utils import get_processor
    from transformers import AutoConfig

    from pevlm_sglang.families.llava_video.checkpoint import load_processor
    from pevlm_sglang.families.llava_video.processor import LlavaVideoProcessor

    hf_processor = load_processor(get_processor, str(model), model_name=str(model))
    config = AutoConfig.from_pretrained(model)
    with _placeholders(LlavaVideoProcessor, config, hf_processor, "<video>") as ask:
        yield ask


@contextlib.contextmanager
def _longvila(model: Path) -> Iterator[Callable[..., Any]]:
    from sglang.srt.utils.hf_transformers_utils import get_config, get_processor

    from pevlm_sglang.families.longvila import checkpoint
    from pevlm_sglang.families.longvila.processor import LongVilaProcessor

    checkpoint.register()
    config = get_config(str(model), trust_remote_code=False)
    hf_processor = get_processor(str(model), model_name=str(model))
    with _placeholders(LongVilaProcessor, config, hf_processor, "<vila/video>") as ask:
        yield ask


@contextlib.contextmanager
def _placeholders(
    kind: Any, config: Any, hf_processor: Any, video_token: str
) -> Iterator[Callable[..., Any]]:
    from sglang.srt.runtime_context import get_context

    settings = {"video": {"num_frames": 8, "max_frames": 8}}
    context = get_context().override_server_args(
        device="cpu", dtype="float32", mm_process_config=settings
    )
    with context as server_args:
        server_args._pevlm_config = PevlmConfig(**SMALL_CACHE)
        processor = kind(config, server_args, hf_processor, "default")

        def ask(videos: list[str], images: list[str]) -> Any:
            prompt = f"{video_token * len(videos)}{'<image>' * len(images)}What?"
            request = SimpleNamespace(video_data=videos, modalities=None)
            return asyncio.run(processor.process_mm_data_async(images, None, prompt, request))

        yield ask


@contextlib.contextmanager
def _faulty(_model: Path) -> Iterator[Callable[..., Any]]:
    """Not a family: runs the file as Python."""
    yield lambda videos, images: exec(Path((videos or images)[0]).read_text())


PROCESSORS: dict[str, Any] = {
    "qwen2_5_vl": _qwen,
    "internvl": _internvl,
    "llava_video": _llava_video,
    "longvila": _longvila,
    "faulty": _faulty,
}
"""Family → a context with its processor: videos, images → SGLang's output."""

if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
