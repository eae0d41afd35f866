"""The small model on Hugging Face's code, answering under a method of ``methods.py``.

All questions about a video are answered in one pass over its tokens: each sees the video and itself
alone. A question is right when every token of its answer, and the end after it, is the likeliest
where the right ones were given before it, which is the same as a greedy answer that is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy.dataset import HELD_OUT, HELD_OUT_SCENES, make_clip
from accuracy.methods import Method, Prompt, Recipe, packed, weights
from accuracy.model import AFTER, BEFORE, STEP_TOKENS, video_positions
from accuracy.questions import Question

THREADS = 1  # of torch: sequences of some hundred tokens gain little from more, and lose much where
# other work shares the cores
Record = Callable[[torch.Tensor], None]


class Reader:
    """The model on Hugging Face's code, in fp32, with the attention of a recipe.

    Args:
        model: directory of the checkpoint.
    """

    def __init__(self, model: Path) -> None:
        from transformers import (
            AttentionInterface,
            AutoProcessor,
            Qwen2_5_VLForConditionalGeneration,
        )

        AttentionInterface.register("recipe", _recipe_attention)
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model,
            dtype=torch.float32,
            attn_implementation={"text_config": "recipe", "vision_config": "sdpa"},
        ).eval()
        self.tokenizer = self.processor.tokenizer
        self.before = self.tokenizer.encode(BEFORE)

    @torch.no_grad()
    def see(self, video: Path) -> torch.Tensor:
        """``[steps * STEP_TOKENS, hidden]`` features of a file, by way of ``qwen-vl-utils``."""
        from qwen_vl_utils import process_vision_info

        content = [{"type": "video", "video": str(video), "min_pixels": 56 * 56, "fps": 2.0}]
        _, videos, settings = process_vision_info(
            [{"role": "user", "content": content}],
            return_video_kwargs=True,
            return_video_metadata=True,
        )
        frames, metadata = videos[0]
        inputs = self.processor(
            text=["<|vision_start|><|video_pad|><|vision_end|>"],
            videos=[frames],
            video_metadata=[metadata],
            return_tensors="pt",
            do_resize=False,
            **settings,
        )
        assert float(inputs["second_per_grid_ts"][0]) == 1.0, "sampled at 2 frames a second"
        vision = self.model.model.visual
        out = vision(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
        features: torch.Tensor = out.pooler_output
        return features

    def prompt(self, steps: int, after: int) -> Prompt:
        """Of a video of ``steps`` steps and ``after`` tokens behind it."""
        start = len(self.before)
        video, goes_on = video_positions(start, steps)
        text = (torch.arange(after) + goes_on).expand(3, -1)
        positions = torch.cat([torch.arange(start).expand(3, -1), video, text], 1)
        ranges = [(start + STEP_TOKENS * i, start + STEP_TOKENS * (i + 1)) for i in range(steps)]
        return Prompt(ranges, positions)

    def texts(self, questions: Sequence[Question]) -> list[list[int]]:
        """Of each question, the tokens from the video's end to where the answer begins."""
        return [self.tokenizer.encode(AFTER.format(question=q.text)) for q in questions]

    @torch.no_grad()
    def right(
        self, features: torch.Tensor, questions: Sequence[Question], method: Method
    ) -> list[bool]:
        """Which questions about a video are answered right."""
        asked = self.texts(questions)
        answers = [self.tokenizer.encode(f"{q.answer}<|im_end|>") for q in questions]
        texts = [a + b[:-1] for a, b in zip(asked, answers, strict=True)]
        likeliest = self.logits(features, texts, method).argmax(-1).tolist()
        found, end = [], 0
        for text, answer in zip(texts, answers, strict=True):
            end += len(text)
            found.append(likeliest[end - len(answer) : end] == answer)
        return found

    def logits(
        self,
        features: torch.Tensor,
        texts: Sequence[Sequence[int]],
        method: Method,
        record: Record | None = None,
    ) -> torch.Tensor:
        """Of the tokens after a video.

        Args:
            features: ``[steps * STEP_TOKENS, hidden]``
            texts: token ids; each sees the video and itself alone.
            record: called in each layer with the attention weights ``[1, heads, length, length]``
                of the prompt with all texts one after the other.

        Returns:
            ``[tokens of all texts, vocabulary]`` fp32
        """
        language = self.model.model.language_model
        lengths = [len(text) for text in texts]
        prompt = self.prompt(len(features) // STEP_TOKENS, max(lengths))
        recipe = packed(method(prompt), prompt.end, lengths)
        ids = torch.tensor([token for text in texts for token in text])
        before = language.embed_tokens(torch.tensor(self.before))
        hidden = language(
            inputs_embeds=torch.cat([before, features, language.embed_tokens(ids)])[None],
            position_ids=recipe.positions[:, None],
            attention_mask={"full_attention": None},
            use_cache=False,
            recipe=recipe,
            record=record,
        ).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden[0, prompt.end :])
        return logits


def _recipe_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    recipe: Recipe,
    record: Record | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    given = weights(query, key, recipe, scaling)
    if record is not None:
        record(given)
    return (given @ value).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Case:
    """A held-out video with its questions.

    Attributes:
        frames: sampled.
        features: ``[steps * STEP_TOKENS, hidden]`` of the vision tower.
        questions: no two alike.
    """

    frames: int
    features: torch.Tensor
    questions: list[Question]


def held_out(
    reader: Reader,
    videos: int,
    each: int,
    work: Path,
    lengths: Sequence[int] = HELD_OUT_SCENES,
) -> list[Case]:
    """``videos`` videos of each length, ``each`` questions a task where they allow it.

    Args:
        work: directory for the video files.
        lengths: in scenes.
    """
    cases = []
    for scenes in lengths:
        for i in range(videos):
            clip = make_clip(HELD_OUT, scenes, i, each)
            cases.append(Case(clip.frames, reader.see(clip.write(work)), clip.questions))
    return cases
