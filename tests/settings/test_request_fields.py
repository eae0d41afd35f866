"""What a request must not hold: each of these ended SGLang 0.5.23's scheduler, or was HTTP 500."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from pevlm_sglang.settings.request_fields import check

VOCABULARY = 100


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"session_params": {"id": {}}}, "session_params: id: Expected `str"),
        ({"session_params": {"id": "a", "rid": []}}, "session_params: rid: Expected `str"),
        ({"session_params": {"id": "a", "name": 1}}, "session_params: expected no 'name'"),
        ({"positional_embed_overrides": ["a"]}, "positional_embed_overrides: expected SGLang's"),
        ({"return_hidden_states": [True]}, "return_hidden_states: expected one value"),
        ({"sampling_params": [{}]}, "sampling_params: expected one value"),
        ({"sampling_params": {"max_new_tokens": "a"}}, "max_new_tokens: Expected `int"),
        ({"sampling_params": {"temperature": [1]}}, "temperature: Expected `float"),
        ({"sampling_params": {"logit_bias": 3}}, "logit_bias: Expected `object"),
        ({"sampling_params": {"a": 3}}, "sampling_params: expected no 'a'"),
        ({"sampling_params": {"n": 10**9}}, "n: expected 1 to 1024, got 1000000000"),
        ({"sampling_params": {"n": -1}}, "n: expected 1 to 1024, got -1"),
        ({"sampling_params": {"beam_width": 2000}}, "beam_width: expected 1 to 1024, got 2000"),
        ({"top_logprobs_num": 101}, "top_logprobs_num: expected 0 to 100, got 101"),
        ({"top_logprobs_num": -1}, "top_logprobs_num: expected 0 to 100, got -1"),
        (
            {"text": None, "input_ids": [0, -1]},
            "input_ids: expected token ids from 0 to 99, got -1",
        ),
        ({"text": None, "input_ids": [[1], [100]]}, "from 0 to 99, got 100"),
        ({"text": ["a", "b"], "video_data": ["c"]}, "an entry for each of 2 prompts, got 1"),
        ({"text": ["a"], "sampling_params": [{"n": 0.5}]}, "n: Expected `int`"),
    ],
)
def test_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the reason is below)
        check(GenerateReqInput(**{"text": "a", **fields}), VOCABULARY)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampling_params": {"temperature": 0, "n": 2, "stop": ["a"], "stop_token_ids": [1]}},
        {"sampling_params": {"max_new_tokens": None, "custom_params": {"pevlm": {"a": 1}}}},
        {"session_params": {"id": "a", "rid": None, "offset": -1, "replace": True}},
        {"text": None, "input_ids": [0, 99], "top_logprobs_num": 100},
        {"text": None, "input_ids": [[0], []], "video_data": ["a", None]},
        {"text": ["a", "b"], "sampling_params": [{}, {"n": 1}], "return_logprob": [True, False]},
        {"text": ["a", "b"], "video_data": "c"},
        {"text": None, "input_ids": [], "session_params": {"id": "a"}},
    ],
)
def test_taken(fields: dict[str, Any]) -> None:
    check(GenerateReqInput(**{"text": "a", **fields}), VOCABULARY)
