"""Answers of the small model to held-out videos under each method, as JSON.

    python benchmarks/accuracy/evaluate.py --videos 60

Method. Held-out videos (own seeds, and lengths that training never saw: 64 and 96 sampled frames)
are encoded with H.264, read back through ``qwen-vl-utils``, and asked questions of each task. A
question is answered under each method of ``methods.py`` on Hugging Face's model in fp32. An answer
is right when the model's greedy answer is the right one to the last token and then ends.

Accuracies have 95 % bootstrap intervals over videos; differences to full attention are tested by
flipping the sign of whole videos' differences at random (two-sided).

``results/held_out.json`` holds a card, every question with the methods that answered it right, and
the summary; ``tables.py`` makes Markdown of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.dataset import HELD_OUT, HELD_OUT_SCENES, make_clip
from accuracy.methods import (
    Method,
    Prompt,
    Recipe,
    ape,
    attention,
    block_attention,
    full,
    pevlm,
    star_attention,
)
from accuracy.model import AFTER, BEFORE, STEP_TOKENS, video_positions
from accuracy.questions import TASKS, Question

MODEL = Path(__file__).parent / "model"
RESULTS = Path(__file__).parent / "results"
SINK_STEPS = BLOCK_STEPS = 8  # 16 sampled frames
BLOCK_TOKENS = 30  # about as many; as with the paper's 4096, no whole number of frames
RESAMPLES = 2000


def all_methods() -> dict[str, Method]:
    """The rows of the tables."""
    ours = partial(pevlm, sink_steps=SINK_STEPS, block_steps=BLOCK_STEPS, block_tokens=BLOCK_TOKENS)
    size = BLOCK_TOKENS
    return {
        "full": full,
        "block_attention": block_attention(block_tokens=size),
        "ape_t1.0": ape(block_tokens=size),
        "ape_t0.9": ape(block_tokens=size, temperature=0.9),
        "star_attention": star_attention(block_tokens=size),
        "pevlm": ours(),
        "pevlm_without_sp": ours(sp=False),
        "pevlm_without_df": ours(df=False),
        "pevlm_without_fs": ours(fs=False),
        "only_sp": ours(df=False, fs=False),
        "only_sp_df": ours(fs=False),
        "no_component": ours(sp=False, df=False, fs=False),
        "ape_t1.0_sequential": ape(block_tokens=size, sequential=True),
        "star_attention_reused": star_attention(block_tokens=size, reuse=True),
    }


class Reader:
    """The model on Hugging Face's code, with the attention of a recipe.

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

    @torch.no_grad()
    def right(
        self, features: torch.Tensor, questions: list[Question], method: Method
    ) -> list[bool]:
        """Which questions about a video are answered right."""
        found = [False] * len(questions)
        texts = [self.tokenizer.encode(AFTER.format(question=q.text)) for q in questions]
        answers = [self.tokenizer.encode(f"{q.answer}<|im_end|>") for q in questions]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            groups.setdefault((len(text), len(answer)), []).append(i)
        for (asked, said), members in groups.items():
            recipe = method(self.prompt(len(features) // STEP_TOKENS, asked + said - 1))
            tokens = torch.tensor([texts[i] + answers[i][:-1] for i in members])
            logits = self.logits(features, tokens, recipe)[:, -said:]
            wanted = torch.tensor([answers[i] for i in members])
            for i, ok in zip(members, (logits.argmax(-1) == wanted).all(1).tolist(), strict=True):
                found[i] = ok
        return found

    def logits(self, features: torch.Tensor, tokens: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        """``[questions, length, vocabulary]`` of the text after the video, ``[questions, n]``."""
        language = self.model.model.language_model
        n = len(tokens)
        before = language.embed_tokens(torch.tensor(self.before))
        shared = torch.cat([before, features]).expand(n, -1, -1)
        hidden = language(
            inputs_embeds=torch.cat([shared, language.embed_tokens(tokens)], 1),
            position_ids=recipe.positions[:, None].expand(3, n, -1),
            attention_mask={"full_attention": None},
            use_cache=False,
            recipe=recipe,
        ).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden[:, -tokens.shape[1] :])
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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    return attention(query, key, value, recipe, scaling).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Case:
    """A held-out video with its questions."""

    frames: int
    features: torch.Tensor
    questions: list[Question]


def held_out(reader: Reader, videos: int, each: int, work: Path) -> list[Case]:
    """``videos`` videos of each held-out length, ``each`` questions a task where they allow it."""
    cases = []
    for scenes in HELD_OUT_SCENES:
        for i in range(videos):
            clip = make_clip(HELD_OUT, scenes, i, each)
            features = reader.see(clip.write(work))
            cases.append(Case(clip.frames, features, clip.questions))
    return cases


def summary(
    rows: list[dict[str, Any]], methods: list[str], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Per method: accuracy of each task and of all (the mean of the tasks), with intervals, and
    the difference to full attention with its p-value.

    Args:
        rows: one a question: ``video``, ``task``, and ``right``, method → bool.
    """
    videos = sorted({row["video"] for row in rows})
    number = {video: i for i, video in enumerate(videos)}
    right = np.zeros((len(methods), len(videos), len(TASKS)))
    asked = np.zeros((len(videos), len(TASKS)))
    for row in rows:
        where = number[row["video"]], TASKS.index(row["task"])
        asked[where] += 1
        for i, method in enumerate(methods):
            right[(i, *where)] += row["right"][method]
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(videos), [1 / len(videos)] * len(videos), RESAMPLES)
    signs = rng.choice([-1.0, 1.0], (RESAMPLES, len(videos)))
    base = methods.index("full")
    found = {}
    for i, method in enumerate(methods):
        tasks = right[i].sum(0) / asked.sum(0)
        by_draw = (draws @ right[i]) / (draws @ asked)
        intervals = np.quantile(by_draw, [0.025, 0.975], axis=0).T
        whole = np.quantile(by_draw.mean(1), [0.025, 0.975])
        # A video's share in the mean over tasks, so that its sign can be flipped as a whole.
        shares = ((right[i] - right[base]) / asked.sum(0)).mean(1)
        difference = shares.sum()
        extreme = abs(signs @ shares) >= abs(difference) - 1e-12
        found[method] = {
            "accuracy": round(float(tasks.mean()), 4),
            "interval": [round(float(x), 4) for x in whole],
            "tasks": {
                task: {
                    "accuracy": round(float(tasks[j]), 4),
                    "interval": [round(float(x), 4) for x in intervals[j]],
                    "questions": int(asked[:, j].sum()),
                }
                for j, task in enumerate(TASKS)
            },
            "minus_full": round(float(difference), 4),
            "p_value": round(float((extreme.sum() + 1) / (RESAMPLES + 1)), 4),
        }
    return found


def evaluate(
    reader: Reader, cases: list[Case], methods: Mapping[str, Method]
) -> list[dict[str, Any]]:
    """One row a question: which methods answered it right."""
    rows = []
    for number, case in enumerate(cases):
        right = {
            name: reader.right(case.features, case.questions, m) for name, m in methods.items()
        }
        for i, question in enumerate(case.questions):
            rows.append(
                {
                    "video": number,
                    "frames": case.frames,
                    "task": question.task,
                    "question": question.text,
                    "answer": question.answer,
                    "right": {name: right[name][i] for name in methods},
                }
            )
    return rows


def _as_json(result: dict[str, Any], rows: list[dict[str, Any]], names: list[str]) -> str:
    """Indented, but for a line a question, whose last entry has a 1 for each method in the order
    of ``methods`` that answered it right."""
    columns = ("video", "frames", "task", "question", "answer")
    lines = [
        [*(row[name] for name in columns), "".join(str(int(row["right"][name])) for name in names)]
        for row in rows
    ]
    head = json.dumps({**result, "methods": names, "columns": [*columns, "right"]}, indent=1)
    body = ",\n  ".join(json.dumps(line) for line in lines)
    return f'{head[:-2]},\n "questions": [\n  {body}\n ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--videos", type=int, default=60, help="of each length")
    parser.add_argument("--each", type=int, default=3, help="questions a task and video")
    parser.add_argument("--methods", nargs="*", help="names (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS / "held_out.json")
    options = parser.parse_args()
    methods = all_methods()
    if options.methods:
        methods = {name: methods[name] for name in options.methods}
    reader = Reader(options.model)
    with tempfile.TemporaryDirectory() as work:
        cases = held_out(reader, options.videos, options.each, Path(work))
    rows = evaluate(reader, cases, methods)
    names = [*methods]
    packages = ("torch", "transformers", "qwen-vl-utils")
    result: dict[str, Any] = {
        "card": {name: version(name) for name in packages}
        | {"weights_sha256": sha256((options.model / "model.safetensors").read_bytes()).hexdigest()}
        | {
            "python": platform.python_version(),
            "sink_frames": 2 * SINK_STEPS,
            "block_frames": 2 * BLOCK_STEPS,
            "block_tokens": BLOCK_TOKENS,
            "videos": len(cases),
            "questions": len(rows),
        },
        "summary": {"all": summary(rows, names)}
        | {
            str(2 * scenes): summary([row for row in rows if row["frames"] == 2 * scenes], names)
            for scenes in HELD_OUT_SCENES
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(_as_json(result, rows, names))
    for name, found in result["summary"]["all"].items():
        tasks = " ".join(f"{task} {v['accuracy']:.3f}" for task, v in found["tasks"].items())
        print(
            f"{name:24} {found['accuracy']:.3f} {found['interval']} p {found['p_value']} | {tasks}"
        )


if __name__ == "__main__":
    main()
