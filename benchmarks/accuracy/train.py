"""Train the small video model from scratch, with full attention only.

    python benchmarks/accuracy/train.py --minutes 60

Resumable: it goes on from its last checkpoint; when its minutes are over (``--minutes 0``: at once)
it writes ``model/`` and the curve, ``results/training.json``. README.md has the phases.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import fast
from accuracy.dataset import HELD_OUT_SCENES, TRAIN, VALIDATION
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

# glibc otherwise gives large blocks back and faults them in again, at half the speed.
_LIBC = ctypes.CDLL("libc.so.6")
_LIBC.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
_LIBC.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
WORK_DIR = Path(__file__).resolve().parents[1] / ".cache" / "accuracy"
MODEL = Path(__file__).parent / "model"
RESULTS = Path(__file__).parent / "results"
SLOT = 12  # tokens of the longest question with its answer
ANSWER = 3  # tokens of the longest answer with <|im_end|>
IGNORED = -100
VALIDATION_SCENES = (12, 24, 40)
TOKENS = 4500  # a step


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
    """Model, optimizer and the number of steps done."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.options = options
        self.token_ids = write_tokenizer(work / "model")
        write_processor(work / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(work / "model")
        self.model = make_model(self.token_ids, options.seed)
        self.before = torch.tensor(self.tokenizer.encode(BEFORE))
        self.cache: dict[str, list[int]] = {}
        # Reads shape or digit, colour and quarter off a video token; only for training.
        self.kinds = (len(SHAPES) + 11, len(COLOURS) + 1, STEP_TOKENS)
        self.reader = torch.nn.Linear(192, sum(self.kinds))
        self.rememberer = torch.nn.Linear(192, len(COLOURS) + len(PLACES))
        if options.compile:
            fast.compile_small_pieces()
        self.bank: torch.Tensor | None = None
        self.vision_rotation = fast.vision_rotation(self.model.model.visual)

    def tokens(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text)
        return self.cache[text]

    def batch(self, seed: tuple[int, ...], videos: int, scenes: int, questions: int) -> Batch:
        rng = np.random.default_rng(seed)
        worlds = [make_world(rng, scenes) for _ in range(videos)]
        slots = np.full((videos, questions, SLOT), self.token_ids["<|endoftext|>"])
        targets = np.full((videos, questions, SLOT), IGNORED)
        tasks = np.zeros((videos, questions), dtype=np.int64)
        for i, world in enumerate(worlds):
            for j in range(questions):
                question: Question | None = None
                while question is None:
                    tasks[i, j] = rng.choice(len(TASKS), p=self.options.weights)
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

    def freeze_vision(self, seed: int, variants: int = 8) -> None:
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

    def evaluate(self, scenes: int, videos: int = 40, questions: int = 18) -> dict[str, float]:
        """Accuracy by task: every token of the answer is the likeliest."""
        right, asked = np.zeros(len(TASKS)), np.zeros(len(TASKS))
        with torch.no_grad():
            for i in range(0, videos, 20):
                seed = (VALIDATION, scenes, i)
                batch = self.batch(seed, 20, scenes, questions)
                logits, targets, _ = self.logits(batch, torch.Generator().manual_seed(i))
                ok = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1).numpy()
                tasks = batch.tasks.flatten().numpy()
                right += np.bincount(tasks, ok, len(TASKS))
                asked += np.bincount(tasks, minlength=len(TASKS))
        return {
            task: round(float(r / n), 4) for task, r, n in zip(TASKS, right, asked, strict=True)
        }


def make_optimizers(trainer: Trainer, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, biases and norms."""
    named = dict(trainer.model.named_parameters())
    inner = [n for n, p in named.items() if p.dim() == 2 and (".layers." in n or ".blocks." in n)]
    table = "model.language_model.embed_tokens.weight"
    outer = [p for n, p in named.items() if n not in (*inner, table)]
    outer += [*trainer.reader.parameters(), *trainer.rememberer.parameters()]
    muon = torch.optim.Muon(
        [{"params": [named[n] for n in inner], "peak": options.muon_lr}],
        lr=options.muon_lr,
        weight_decay=0.01,
    )
    adam = torch.optim.AdamW(
        [
            {"params": outer, "peak": options.lr},
            {"params": [named[table]], "peak": options.embed_lr},
        ],
        lr=options.lr,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    return [muon, adam]


def scenes_of_step(rng: np.random.Generator, step: int, stages: list[list[int]]) -> int:
    """Length of the videos of a step: the longest grows with the stages ``[step, scenes]``."""
    longest = next(scenes for until, scenes in reversed(stages) if step >= until)
    allowed = [n for n in range(4, longest + 1) if n not in HELD_OUT_SCENES]
    return int(rng.choice(allowed))


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    work: Path = options.work_dir
    trainer = Trainer(work, options)
    optimizers = make_optimizers(trainer, options)
    step, spent, curve = 0, 0.0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists() and not options.fresh:
        state = torch.load(checkpoint, weights_only=False)
        trainer.model.load_state_dict(state["model"])
        trainer.reader.load_state_dict(state["reader"])
        if "rememberer" in state:
            trainer.rememberer.load_state_dict(state["rememberer"])
        for optimizer, saved in zip(optimizers, state["optimizers"] or (), strict=False):
            optimizer.load_state_dict(saved)
        step, spent, curve = state["step"], state["spent"], state["curve"]
    if options.frozen_vision:
        trainer.freeze_vision(step)
    if options.restart_language:
        trainer.restart_language(options.seed)
        optimizers = make_optimizers(trainer, options)
    if options.align_words:
        trainer.align_words()
    start = last = time.time()
    losses: list[float] = []
    by_task = np.zeros((2, len(TASKS)))
    began = spent
    while spent < options.minutes * 60:
        rng = np.random.default_rng((TRAIN, options.seed, step))
        scenes = scenes_of_step(rng, step, options.stages)
        length = len(trainer.before) + scenes * STEP_TOKENS + options.questions * SLOT
        batch = trainer.batch(
            (TRAIN, options.seed, step, 1), max(4, TOKENS // length), scenes, options.questions
        )
        left = options.minutes * 60 - spent
        cool = min(1.0, left / (0.25 * options.minutes * 60)) if options.cool else 1.0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / 100) * max(cool, 0.02)
        logits, targets, reading = trainer.logits(batch, torch.Generator().manual_seed(step))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        trainer.model.zero_grad(set_to_none=True)
        trainer.reader.zero_grad(set_to_none=True)
        trainer.rememberer.zero_grad(set_to_none=True)
        (loss + options.reading * reading).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        ok = ((logits.detach().argmax(-1) == targets) | (targets == IGNORED)).all(1).numpy()
        by_task[0] += np.bincount(batch.tasks.flatten().numpy(), ok, len(TASKS))
        by_task[1] += np.bincount(batch.tasks.flatten().numpy(), minlength=len(TASKS))
        step += 1
        spent = began + time.time() - start
        if step % 50 == 0:
            rates = " ".join(
                f"{t} {a:.2f}" for t, a in zip(TASKS, by_task[0] / by_task[1].clip(1), strict=True)
            )
            print(
                f"{step} {spent:.0f}s loss {np.mean(losses):.3f} reading {reading:.3f} | {rates}",
                flush=True,
            )
            losses.clear()
            by_task[:] = 0
        if time.time() - last > options.every or spent >= options.minutes * 60:
            last = time.time()
            scores = {str(2 * n): trainer.evaluate(n) for n in VALIDATION_SCENES}
            curve.append({"step": step, "seconds": round(spent), "accuracy": scores})
            print(json.dumps(curve[-1]), flush=True)
            torch.save(
                {
                    "model": trainer.model.state_dict(),
                    "reader": trainer.reader.state_dict(),
                    "rememberer": trainer.rememberer.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step,
                    "spent": spent,
                    "curve": curve,
                },
                checkpoint.with_suffix(".new"),
            )
            checkpoint.with_suffix(".new").rename(checkpoint)
    export(trainer, curve, step, options.seed)


def export(trainer: Trainer, curve: list[dict[str, Any]], step: int, seed: int) -> None:
    """The model in bfloat16 with its tokenizer and processor files, and the training curve."""
    write_tokenizer(MODEL)
    write_processor(MODEL)
    trainer.model.to(torch.bfloat16).save_pretrained(MODEL)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "seed": seed,
        "steps": step,
        "what": "accuracy on validation videos by sampled frames and task",
        "curve": curve,
    }
    (RESULTS / "training.json").write_text(json.dumps(content, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="of training in all")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--questions", type=int, default=12, help="a video")
    parser.add_argument("--every", type=float, default=120, help="seconds between checkpoints")
    parser.add_argument(
        "--stages", type=json.loads, default=[[0, 6], [400, 12], [1000, 24], [2500, 56]]
    )
    parser.add_argument("--weights", type=json.loads, default=[1 / 7] * 7)
    parser.add_argument("--reading", type=float, default=0.3, help="weight of reading tokens")
    parser.add_argument("--frozen-vision", action="store_true")
    parser.add_argument("--restart-language", action="store_true", help="at the start of this run")
    parser.add_argument("--embed-lr", type=float, default=1e-3)
    parser.add_argument("--align-words", action="store_true", help="at the start of this run")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-cool", dest="cool", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
