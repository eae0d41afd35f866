"""Every question under every setting, on empty caches, one request at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pevlm_sglang.settings.config import PevlmConfig
from pevlm_sglang.tune.client import Answer, Client, ServerError, Work
from pevlm_sglang.tune.measurements import FULL, Measurement, Measurements, Setting
from pevlm_sglang.tune.questions import Question

TOP_LOGPROBS = 20

_SERVER_OPTIONS = (
    *("model_path", "weight_version", "dtype", "quantization", "kv_cache_dtype", "device"),
    *("tp_size", "dp_size", "chunked_prefill_size", "mm_process_config", "chat_template"),
)
_PEVLM_OPTIONS = ("base_backend", "prefill_kernel", "image_runs")
_EMBEDDING_CACHE = (
    "the vision tower did not run: SGLang's cache of video embeddings, which cannot be flushed, "
    "held the video; start the server with SGLANG_VLM_CACHE_SIZE_MB=0 in its environment"
)


def make_settings(
    sink_frames: Sequence[int], block_frames: Sequence[int], frames_per_step: int
) -> list[Setting]:
    """Full attention, and every pair of sink and block sizes.

    Raises:
        ValueError: a size out of range, given twice, or not in whole steps of the server's model.
    """
    for name, sizes in (("sink_frames", sink_frames), ("block_frames", block_frames)):
        for size in sizes:
            PevlmConfig().override({name: size})
            if size % frames_per_step:
                raise ValueError(
                    f"{name}: expected multiples of {frames_per_step}, for the server's model "
                    f"merges {frames_per_step} sampled frames into one step, got {size}"
                )
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"{name}: expected each size once, got {' '.join(map(str, sizes))}")
    return [FULL, *(Setting(sink, block) for sink in sink_frames for block in block_frames)]


def describe_server(info: dict[str, Any], max_tokens: int, *, embed_videos: bool) -> dict[str, Any]:
    """What the measurements depend on beside setting and question.

    Args:
        info: ``/server_info`` of a server with PEVLM.
        max_tokens, embed_videos: of the requests.
    """
    pevlm = info["pevlm"]
    return {
        "sglang_version": info.get("version"),
        **{name: info.get(name) for name in _SERVER_OPTIONS},
        **{f"pevlm_{name}": pevlm[name] for name in _PEVLM_OPTIONS},
        "frames_per_step": pevlm["frames_per_step"],
        "max_tokens": max_tokens,
        "embed_videos": embed_videos,
    }


def pending(
    questions: Sequence[Question], settings: Sequence[Setting], measured: Measurements
) -> list[tuple[Setting, Question]]:
    """What is still to measure, in order.

    A question goes through all settings before the next begins, so that an interrupted sweep has
    measured all settings on the same questions. Questions are shuffled, so that it has seen
    different videos, and each begins with another setting, so that a drift of the machine's speed
    falls on all alike. The order depends on the questions and settings alone.
    """
    shuffled = [*questions]
    random.Random(0).shuffle(shuffled)
    return [
        (setting, question)
        for turn, question in enumerate(shuffled)
        for setting in (settings[(i + turn) % len(settings)] for i in range(len(settings)))
        if (setting, question.key) not in measured.done
    ]


def sweep(
    client: Client,
    todo: Sequence[tuple[Setting, Question]],
    measured: Measurements,
    *,
    total: int,
    max_tokens: int,
) -> None:
    """Measure what is ``pending``, and write each when it is finished.

    Each setting's first request is asked once before, unmeasured: kernels are compiled and tuned
    then.

    Args:
        total: measurements of the whole sweep, those of earlier runs among them.

    Raises:
        ServerError: the server fails or refuses, or did not compute what was asked for.
    """
    from tqdm import tqdm

    warm: set[Setting] = set()
    with tqdm(total=total, initial=total - len(todo), unit="measurement") as bar:
        for setting, question in todo:
            bar.set_postfix_str(setting.name, refresh=False)
            if setting not in warm:
                _measure(client, setting, question, max_tokens)
                warm.add(setting)
            measured.add(_measure(client, setting, question, max_tokens))
            bar.update()


def _measure(client: Client, setting: Setting, question: Question, max_tokens: int) -> Measurement:
    answer, work = client.measure(
        question.video,
        question.text,
        setting=setting.options if setting.is_full else {"enabled": True, **setting.options},
        max_tokens=max_tokens,
        top_logprobs=TOP_LOGPROBS,
    )
    if problem := _problem(setting, answer, work):
        raise ServerError(f"{setting.name}, {question.video}, {question.text!r}: {problem}")
    return Measurement(setting, question.key, answer, work)


def _problem(setting: Setting, answer: Answer, work: Work) -> str | None:
    """Why a request was not what it is meant to be."""
    from pevlm_sglang.observe.observer import (  # imports torch, seconds of a start
        GLOBAL_TOKEN,
        SHORT_VIDEO,
    )

    if not work.is_whole_prompt(answer.prompt_tokens):
        return (
            f"expected a prefill of {answer.prompt_tokens} tokens and nothing else, got "
            f"{work.pairs_computed + work.pairs_saved} attention pairs; a measured server must "
            "have no other traffic"
        )
    if not work.vision_runs:
        return _EMBEDDING_CACHE
    if setting.is_full:
        return "full attention saved attention pairs" if work.pairs_saved else None
    others = {
        reason: tokens
        for reason, tokens in work.dense_tokens.items()
        if tokens and reason not in (GLOBAL_TOKEN, SHORT_VIDEO)
    }
    return f"PEVLM left tokens to full attention: {others}" if others else None
