"""Prompts as token ids, on a server that starts without a tokenizer: SGLang answers in token ids,
and a video is laid out as it is from text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.conftest import FEW_TOKENS
from support.exchange import BATCH_ENV
from support.server import Server
from support.video import video_data_url

pytestmark = pytest.mark.server

TEXT = (
    "<|im_start|>user\nLook: <|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SMALL = ("--pevlm-sink-frames", "2", "--pevlm-block-frames", "2")


def test_token_ids_are_answered_as_text(
    model: Callable[[str], Path], clip: Callable[..., Path]
) -> None:
    """The same tokens with the same log-probs, sparse on both."""
    from transformers import AutoTokenizer

    directory = model("qwen3_vl")  # whose processor reads timestamps from the text
    ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    video = video_data_url(clip(10))
    found = {}
    for flags, prompt in (((), {"text": TEXT}), (("--skip-tokenizer-init",), {"input_ids": ids})):
        options = ("--attention-backend", "pevlm", *FEW_TOKENS, *SMALL, *flags)
        with Server(directory, *options, env=BATCH_ENV) as server:
            body: dict[str, Any] = {
                **prompt,
                "video_data": [video],
                "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
                "return_logprob": True,
            }
            answer = server.post("/generate", body)
            assert answer.status_code == 200, answer.text
            meta = answer.json()["meta_info"]
            sparse = server.info()["internal_states"][0]["pevlm"]["sparse_tokens"]
            found[flags] = meta["output_token_logprobs"], meta["prompt_tokens"], sparse
    text, token_ids = found.values()
    assert text[1:] == token_ids[1:]
    assert text[2] > 0
    for one, other in zip(text[0], token_ids[0], strict=True):
        assert one[1] == other[1]
        assert one[0] == pytest.approx(other[0], abs=1e-5)
