"""Real SGLang servers on the CPU, shared by all tests here; at most one runs at a time.

A test names its servers with ``@pytest.mark.parametrize("exchange", [...], indirect=True)``. The
tests of one server run one after the other, so that each server starts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from support.exchange import BATCH_ENV, Exchange
from support.families import internvl_model, llava_video_tiny, longvila, qwen3_vl
from support.families.internvl import InternVLOracle
from support.families.llava_video import NUM_FRAMES, LlavaVideoOracle
from support.families.qwen3_vl import Qwen3VLOracle
from support.families.qwen_vl import QwenVLOracle
from support.oracle import Oracle
from support.server import Server
from support.tiny import ARCHITECTURES, make_tiny_model
from support.video import write_video

CLIP_SIZE = (112, 84)  # pixels: 12 tokens a step, with the flag below
FEW_TOKENS = ("--mm-process-config", '{"video": {"min_pixels": 3136}}')
TWELVE_FRAMES = ("--mm-process-config", '{"video": {"num_frames": 12, "max_frames": 40}}')

# Every video is too large for SGLang's own cache, so that SGLang alone would encode it every chunk.
NO_EMBEDDING_CACHE = {"SGLANG_VLM_CACHE_SIZE_MB": "0"}


@dataclass(frozen=True)
class Deployment:
    """How to start a server. Its default is 16-frame sinks and blocks on torch_native.

    Attributes:
        flags, env: of the server.
        architecture: of the tiny model, a key of ``MODELS``.
        oracle: the reference for a model's directory.
        video: the flag with which clips become few tokens.
    """

    flags: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    architecture: str = "qwen2_5_vl"
    oracle: Callable[[Path], Oracle] = QwenVLOracle
    video: tuple[str, ...] = FEW_TOKENS


MODELS: dict[str, Callable[[Path], Path]] = {
    **{name: partial(make_tiny_model, architecture=name) for name in ARCHITECTURES},
    "qwen3_vl": qwen3_vl.make_tiny_model,
    "qwen3_vl_moe": partial(qwen3_vl.make_tiny_model, moe=True),
    "llava_video": llava_video_tiny.make_tiny_model,
    "longvila": longvila.make_tiny_model,
    "internvl": internvl_model.make_tiny_model,
    "internvl_moe": partial(internvl_model.make_tiny_model, moe=True),
}
"""Architecture → writes a tiny model into a directory."""


DEPLOYMENTS = {
    "chunk_257": Deployment(("--chunked-prefill-size", "257")),
    "mixed_page_16": Deployment(
        (
            *("--chunked-prefill-size", "64", "--page-size", "16"),
            *("--enable-mixed-chunk", "--disable-overlap-schedule"),
        ),
        NO_EMBEDDING_CACHE,
    ),
    "one_chunk": Deployment(("--chunked-prefill-size", "8192", "--disable-radix-cache")),
    "qwen2_vl_retracting": Deployment(
        ("--chunked-prefill-size", "257", "--disable-radix-cache"),
        {"SGLANG_TEST_RETRACT": "1", **NO_EMBEDDING_CACHE},
        architecture="qwen2_vl",
    ),
    "longvila": Deployment(
        ("--chunked-prefill-size", "131"),
        NO_EMBEDDING_CACHE,
        architecture="longvila",
        oracle=longvila.LongVilaOracle,
        video=("--mm-process-config", '{"video": {"max_frames": 60}}'),
    ),
    "triton": Deployment(
        (
            *("--chunked-prefill-size", "64", "--pevlm-base-backend", "triton"),
            *("--disable-overlap-schedule", "--skip-server-warmup"),
        ),
        {"TRITON_INTERPRET": "1"},
    ),
    "llava_video": Deployment(
        (
            *("--chunked-prefill-size", "64", "--enable-mixed-chunk"),
            "--disable-overlap-schedule",
        ),
        architecture="llava_video",
        oracle=LlavaVideoOracle,
        video=(
            "--mm-process-config",
            f'{{"video": {{"num_frames": {NUM_FRAMES}, "max_frames": 80}}}}',
        ),
    ),
    "two_ranks_retracting": Deployment(
        ("--chunked-prefill-size", "8192", "--tp", "2"),
        {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_TEST_RETRACT": "1", **NO_EMBEDDING_CACHE},
    ),
    "two_replicas": Deployment(
        ("--chunked-prefill-size", "257", "--dp-size", "2"),
        {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    ),
    "streaming_sessions": Deployment(
        ("--chunked-prefill-size", "131", "--enable-streaming-session")
    ),
    "two_stages": Deployment(
        ("--chunked-prefill-size", "131", "--pp-size", "2"),
        {
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
            # SGLang's second stage never hears that requests are held back, and waits for ever.
            "SGLANG_ENABLE_COLOCATED_BATCH_GEN": "false",
            **NO_EMBEDDING_CACHE,
        },
    ),
    "qwen3_vl": Deployment(
        ("--chunked-prefill-size", "131"),
        NO_EMBEDDING_CACHE,
        architecture="qwen3_vl",
        oracle=Qwen3VLOracle,
    ),
    "qwen3_vl_moe": Deployment(
        ("--chunked-prefill-size", "257"), architecture="qwen3_vl_moe", oracle=Qwen3VLOracle
    ),
    "internvl": Deployment(
        ("--chunked-prefill-size", "131"),
        NO_EMBEDDING_CACHE,
        architecture="internvl",
        oracle=partial(InternVLOracle, num_frames=12),
        video=TWELVE_FRAMES,
    ),
    "internvl_moe": Deployment(
        ("--chunked-prefill-size", "257"),
        architecture="internvl_moe",
        oracle=partial(InternVLOracle, num_frames=12),
        video=TWELVE_FRAMES,
    ),
}


@pytest.hookimpl(trylast=True)  # after pytest's own order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = [None, *DEPLOYMENTS]

    def place(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        return order.index(callspec.params.get("exchange") if callspec else None)

    items.sort(key=place)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, by its architecture."""
    directory = tmp_path_factory.mktemp("models")
    return cache(lambda name: MODELS[name](directory / name))


@pytest.fixture(scope="session")
def exchange(request: pytest.FixtureRequest, model: Callable[[str], Path]) -> Iterator[Exchange]:
    """The server that the test names, beside its oracle."""
    deployment = DEPLOYMENTS[request.param]
    directory = model(deployment.architecture)
    flags = ("--attention-backend", "pevlm", *deployment.video, *deployment.flags)
    env = {**BATCH_ENV, **deployment.env}
    with Server(directory, *flags, env=env, startup_timeout=600) as server:
        yield Exchange(server, deployment.oracle(directory))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A video of some seconds, each one step of 12 tokens; another seed is another video."""
    directory = tmp_path_factory.mktemp("clips")

    @cache
    def write(seconds: float, seed: int = 0) -> Path:
        path = directory / f"{seconds}-{seed}.mp4"
        return write_video(path, seconds=seconds, size=CLIP_SIZE, seed=seed)

    return write


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An image of 12 tokens, by its seed."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("pictures")

    @cache
    def write(seed: int) -> Path:
        path = directory / f"{seed}.png"
        pixels = np.random.default_rng(seed).integers(0, 256, (*CLIP_SIZE[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write
