"""The small model in training: batches of questions about videos, its losses, its accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accuracy import fast
from accuracy.dataset import VALIDATION
from accuracy.model import (
    AFTER,
    BEFORE,
    STEP_TOKENS,
    make_model,
    patches,
    video_positions,
    write_processor,
    write_tokenizer,
)
from accuracy.questions import TASKS, Question, ask
from accuracy.recipe import EQUAL
from accuracy.videos import (
    COLOURS,
    EVENTS,
    FILLERS,
    PLACES,
    SHAPES,
    make_world,
    picture_ids,
    quarter_labels,
    render,
)
from torch.nn import functional as F  # noqa: N812 - its name everywhere

SLOT = 12  # tokens of the longest question with its answer
ANSWER = 3  # tokens of the longest answer with <|im_end|>
IGNORED = -100
Weights = tuple[float, ...]  # of the tasks


@dataclass
class Batch:
    """Videos of one length with their questions.

    Attributes:
        pictures: ``[n]`` int64, the different pictures of the batch.
        scenes: ``[videos, scenes]`` int64, indices of ``pictures``.
        slots: ``[videos, questions, SLOT]`` int64 tokens.
        targets: ``[videos, questions, SLOT]`` int64, the next token where it is of the answer.
        tasks: ``[videos, questions]`` int64.
    """

    pictures: torch.Tensor
    scenes: torch.Tensor
    slots: torch.Tensor
    targets: torch.Tensor
    tasks: torch.Tensor


class Trainer:
    """The model with what only training needs.

    Args:
        work: directory for tokenizer and processor files.
        seed: of the weights.
        compiled: fuse the small operations; takes a C++ compiler, and half a minute.
    """

    def __init__(self, work: Path, *, seed: int, compiled: bool) -> None:
        from transformers import AutoTokenizer

        self.token_ids = write_tokenizer(work / "model")
        write_processor(work / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(work / "model")
        self.model = make_model(self.token_ids, seed)
        self.before = torch.tensor(self.tokenizer.encode(BEFORE))
        self.cache: dict[str, list[int]] = {}
        # Reads shape or digit, colour and quarter off a video token; only for training.
        self.kinds = (len(SHAPES) + 11, len(COLOURS) + 1, STEP_TOKENS)
        self.reader = torch.nn.Linear(192, sum(self.kinds))
        self.rememberer = torch.nn.Linear(192, len(COLOURS) + len(PLACES))
        if compiled:
            fast.compile_small_pieces()
        self.bank: torch.Tensor | None = None
        self.vision_rotation = fast.vision_rotation(self.model.model.visual)

    def tokens(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text)
        return self.cache[text]

    def batch(
        self, seed: tuple[int, ...], videos: int, scenes: int, questions: int, weights: Weights
    ) -> Batch:
        rng = np.random.default_rng(seed)
        worlds = [make_world(rng, scenes) for _ in range(videos)]
        slots = np.full((videos, questions, SLOT), self.token_ids["<|endoftext|>"])
        targets = np.full((videos, questions, SLOT), IGNORED)
        tasks = np.zeros((videos, questions), dtype=np.int64)
        for i, world in enumerate(worlds):
            for j in range(questions):
                question: Question | None = None
                while question is None:
                    tasks[i, j] = rng.choice(len(TASKS), p=weights)
                    question = ask(rng, world, TASKS[tasks[i, j]])
                asked = self.tokens(AFTER.format(question=question.text))
                answer = self.tokens(f"{question.answer}<|im_end|>")
                said = asked + answer[:-1]
                slots[i, j, : len(said)] = said
                targets[i, j, len(asked) - 1 : len(asked) + len(answer) - 1] = answer
        ids = np.stack([picture_ids(world) for world in worlds])
        pictures, inverse = np.unique(ids, return_inverse=True)
        return Batch(
            *map(torch.from_numpy, (pictures, inverse.reshape(ids.shape), slots, targets, tasks))
        )

    def logits(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits and targets of the answers, ``[videos * questions, ANSWER, vocabulary]``, and the
        loss of reading the video tokens one by one."""
        model = self.model.model
        videos, scenes = batch.scenes.shape
        questions = batch.slots.shape[1]
        with torch.autocast("cpu", torch.bfloat16):
            if self.bank is None:
                pixels = patches(render(batch.pictures, generator))
                features = fast.vision(model.visual, pixels, *self.vision_rotation)
                seen = features[batch.scenes]
            else:
                which = torch.randint(self.bank.shape[1], batch.scenes.shape, generator=generator)
                seen = self.bank[batch.pictures[batch.scenes], which]
            embed = model.language_model.embed_tokens
            before = embed(self.before).expand(videos, -1, -1)
            video = seen.flatten(1, 2).to(before.dtype)
            x = torch.cat([before, video, embed(batch.slots.flatten(1))], 1).bfloat16()
            prompt = len(self.before) + scenes * STEP_TOKENS
            block, after = video_positions(len(self.before), scenes)
            positions = torch.cat(
                [
                    torch.arange(len(self.before)).expand(3, -1),
                    block,
                    (torch.arange(SLOT) + after).repeat(questions).expand(3, -1),
                ],
                1,
            )
            cos, sin = fast.rotation(model.language_model, positions)
            hidden, early = fast.language(model.language_model, x, cos, sin, prompt, SLOT)
            targets = batch.targets.flatten(0, 1)
            # The answer's tokens are in a row; take ANSWER places from the first.
            first = (targets != IGNORED).int().argmax(1).clamp(max=SLOT - ANSWER)
            places = first[:, None] + torch.arange(ANSWER)
            hidden = hidden[:, prompt:].reshape(videos * questions, SLOT, -1)
            chosen = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            logits = self.model.lm_head(chosen)
        reading = self._remembering(early[:, len(self.before) : prompt], batch)
        if self.bank is None:
            reading = reading + self._reading(features, batch)
        return logits.float(), targets.gather(1, places), reading

    def _remembering(self, first: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Reading the scene before off the tokens of a scene, after the first layer."""
        labels = quarter_labels()[batch.pictures[batch.scenes[:, :-1]]]
        place = (labels[..., 1] < len(COLOURS)).int().argmax(-1)
        colour = labels[..., 1].amin(-1)
        is_object = colour < len(COLOURS)
        read = self.rememberer(first.float().unflatten(1, (-1, STEP_TOKENS))[:, 1:][is_object])
        colours, places = read.split([len(COLOURS), len(PLACES)], -1)
        losses = [
            F.cross_entropy(r.flatten(0, 1), w[is_object].repeat_interleave(STEP_TOKENS))
            for r, w in ((colours, colour), (places, place))
        ]
        return torch.stack(losses).sum()

    def _reading(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        read = self.reader(features.float()).flatten(0, 1).split(self.kinds, -1)
        labels = quarter_labels()[batch.pictures]
        quarters = torch.arange(STEP_TOKENS).expand(len(labels), -1)
        wanted = (labels[..., 0], labels[..., 1], quarters)
        losses = [F.cross_entropy(r, w.flatten()) for r, w in zip(read, wanted, strict=True)]
        return torch.stack(losses).sum()

    def freeze_vision(self, seed: int, variants: int) -> None:
        """See every picture ``variants`` times now, and train the language model on that."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.arange(len(quarter_labels()))
        found = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(variants):
                pixels = patches(render(ids, generator))
                visual = self.model.model.visual
                found.append(fast.vision(visual, pixels, *self.vision_rotation))
        self.bank = torch.stack(found, 1).bfloat16()

    def restart_language(self, seed: int) -> None:
        """Start the language model anew over the vision tower: with embeddings and features of size
        1, so that layers add to a token and do not drown it, and layers that do nothing yet."""
        assert self.bank is not None, "freeze_vision comes first"
        fresh = make_model(self.token_ids, seed)
        self.model.model.language_model.load_state_dict(fresh.model.language_model.state_dict())
        self.model.lm_head.load_state_dict(fresh.lm_head.state_dict())
        with torch.no_grad():
            size = self.bank.float().square().mean().sqrt()
            last = self.model.model.visual.merger.mlp[2]
            for tensor in (last.weight, last.bias, self.bank):
                tensor.div_(size)
            self.model.model.language_model.embed_tokens.weight.div_(0.02)
            for layer in self.model.model.language_model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()

    def align_words(self) -> None:
        """Make the word of each event the direction in which the vision tower puts its picture, so
        that a word finds its event by likeness: one thing to learn instead of one an event."""
        assert self.bank is not None, "freeze_vision comes first"
        labels = quarter_labels()[..., 0]
        features = self.bank.float().mean(1)
        shown = torch.stack([features[labels == i].mean(0) for i in range(len(SHAPES))])
        directions = shown - shown.mean(0)
        table = self.model.model.language_model.embed_tokens.weight
        with torch.no_grad():
            for i, name in enumerate(EVENTS, start=len(FILLERS)):
                for word in (name, f" {name}"):
                    row = table[self.tokens(word)[0]]
                    row.copy_(directions[i] / directions[i].norm() * row.norm())

    def evaluate(self, scenes: int, videos: int, questions: int = 18) -> dict[str, float]:
        """Accuracy by task, of those asked: every token of the answer is the likeliest."""
        right, asked = np.zeros(len(TASKS)), np.zeros(len(TASKS))
        with torch.no_grad():
            for i in range(0, videos, 20):
                seed = (VALIDATION, scenes, i)
                batch = self.batch(seed, min(20, videos - i), scenes, questions, EQUAL)
                logits, targets, _ = self.logits(batch, torch.Generator().manual_seed(i))
                ok = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1).numpy()
                tasks = batch.tasks.flatten().numpy()
                right += np.bincount(tasks, ok, len(TASKS))
                asked += np.bincount(tasks, minlength=len(TASKS))
        found = zip(TASKS, right, asked, strict=True)
        return {task: round(float(r / n), 4) for task, r, n in found if n}
