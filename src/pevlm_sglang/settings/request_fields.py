"""What SGLang takes from a request unchecked, and answers with HTTP 500, or ends of.

FastAPI checks the fields of ``/generate`` that have a type: not what is in mappings, not whether a
request of one prompt has one value where a batch has a list, and not the range of token ids. The
scheduler, which all requests share, does not survive some of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec

MOST_SAMPLES = 1024  # of one prompt; each is a request of its own

_ONE_VALUE = (
    *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num"),
    *("return_sampling_mask", "sampling_logprobs_mode", "return_hidden_states", "lora_path"),
    *("custom_logit_processor", "extra_key", "cache_salt"),
    *("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"),
)
_CHECKED_ELSEWHERE = ("custom_params", "watermark")


def check(request: Any, vocabulary: int) -> None:
    """Refuse a request that SGLang would not survive.

    Args:
        request: SGLang's ``GenerateReqInput``, as it came.
        vocabulary: number of the model's token ids.

    Raises:
        ValueError: names the field, what was expected and what came.
    """
    from sglang.srt.managers.io_struct import PositionalEmbeds, SessionParams
    from sglang.srt.sampling.sampling_params import SamplingParams

    ids = request.input_ids
    single = isinstance(request.text, str) or bool(ids and isinstance(ids[0], int))
    if single:
        for name in _ONE_VALUE:
            if isinstance(value := getattr(request, name, None), list):
                raise _error(name, "one value for one prompt", value)
    for values in _each(request.sampling_params):
        _check_fields("sampling_params", values, SamplingParams)
        for name in ("n", "beam_width"):
            if not 1 <= (values.get(name) or 1) <= MOST_SAMPLES:
                raise _error(name, f"1 to {MOST_SAMPLES}", values[name])
    if request.session_params is not None:
        _check_fields("session_params", request.session_params, SessionParams)
    for value in _each(request.positional_embed_overrides):
        if not isinstance(value, PositionalEmbeds):
            raise _error("positional_embed_overrides", "SGLang's PositionalEmbeds", value)
    for value in _each(request.top_logprobs_num):
        if not 0 <= value <= vocabulary:
            raise _error("top_logprobs_num", f"0 to {vocabulary}", value)
    prompts = request.text or ids or ()
    for name in ("video_data", "audio_data"):
        media = getattr(request, name)
        if not single and isinstance(media, list) and len(media) != len(prompts):
            raise _error(name, f"an entry for each of {len(prompts)} prompts", len(media))
    for prompt in [ids] if ids and isinstance(ids[0], int) else ids or ():
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < vocabulary:
            out = min(prompt) if min(prompt) < 0 else max(prompt)
            raise _error("input_ids", f"token ids from 0 to {vocabulary - 1}", out)


def _each(values: Any) -> Iterable[Any]:
    return [v for v in (values if isinstance(values, list) else [values]) if v is not None]


def _check_fields(name: str, values: Any, struct: type) -> None:
    """Types by SGLang's own declaration of them; None stands for a default."""
    if not isinstance(values, Mapping):
        raise _error(name, "a mapping", values)
    known = _types(struct)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{name}: expected no {str(key)[:50]!r}; SGLang does not know it")
        if value is None or key in _CHECKED_ELSEWHERE:
            continue
        try:
            msgspec.convert(value, known[key])
        except msgspec.ValidationError as error:
            raise ValueError(f"{name}: {key}: {error}") from None


@cache
def _types(struct: type) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def _error(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {str(got)[:100]}")
