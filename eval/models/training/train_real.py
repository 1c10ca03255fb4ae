"""Train the projector between the embedded tower and a pretrained language model, which both stay as they are.

    python -m tokprune.eval.models.training.train_real features DIR EMOJI
    python -m tokprune.eval.models.training.train_real words DIR EMOJI WHEEL_OR_GGUF
    python -m tokprune.eval.models.training.train_real questions DIR EMOJI WHEEL_OR_GGUF
    python -m tokprune.eval.models.training.train_real export DIR

EMOJI is the .tgz file that `make emoji` fetches. One thread a process, seeded; `questions` may be started with
torchrun.

`words` is a start that needs no language model: every patch becomes the sum of the embeddings of the words that say
what it shows and where it lies. `questions` then asks the language model, all questions of a scene in one row; three of
four steps drop visual tokens by subsets that favour no method, half of the time with contiguous positions, as for the
embedded models.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ...tasks import emoji, findit, findone
from .. import path_of, real
from .language import LanguageTrainer, draw_kept, pack, tally
from .recipe import GRID, N_VISUAL
from .tower import COLOURS, SHAPES, pixels, scene_labels
from .train import optimise, start_processes

app = typer.Typer(add_completion=False, no_args_is_help=True)
N_SCENES = {"train": 3_000, "validation": 100}
SHARES = (0.15, 0.35, 0.5)  # of the sources, findone, findit and emoji, in what is learned from
BACKGROUND = "background"
COVERED = 0.25  # of a patch, from where it is labelled with what covers it
Asked = list[tuple[str, str, str]]  # question, answer, kind


class Source(Protocol):
    """Scenes to learn from."""

    def draw(self, split: str, index: int) -> tuple[np.ndarray, Any]:
        """A picture, (96, 96, 3) uint8, and what is in it."""

    def ask(self, rng: np.random.Generator, shown: Any) -> Asked:
        """Questions about it."""

    def says(self, shown: Any) -> list[tuple[str, str]]:
        """Two words for each of the 144 patches."""


class Shapes:
    """findone's or findit's scenes: a patch is said by its shape and its colour."""

    def __init__(self, task: type[findit.FindIt], kinds: Sequence[str]):
        self.draw, self.kinds = task.draw, kinds

    def ask(self, rng: np.random.Generator, shown: list[findit.Shape]) -> Asked:
        return findit.ask(rng, shown, kinds=self.kinds)

    def says(self, shown: list[findit.Shape]) -> list[tuple[str, str]]:
        kind, colour, _ = scene_labels(shown)[1].tolist()
        return [((*SHAPES, BACKGROUND)[k], (*COLOURS, BACKGROUND)[c]) for k, c in zip(kind, colour, strict=True)]


class Drawings:
    """Scenes of emoji: a patch is said by its name and its kind."""

    def __init__(self, package: Path):
        self.emoji = emoji.Emoji(package)
        self.draw = self.emoji.draw

    def ask(self, rng: np.random.Generator, shown: emoji.Thing) -> Asked:
        return emoji.ask(shown)

    def says(self, shown: emoji.Thing) -> list[tuple[str, str]]:
        covered = self.emoji.covered(shown) > COVERED
        return [(shown.name, shown.kind) if inside else (BACKGROUND, BACKGROUND) for inside in covered]


def sources(package: Path) -> dict[str, Source]:
    """What is learned from, by name; `package` is the .tgz file of the emoji."""
    return {
        "findone": Shapes(findone.FindOne, findone.KINDS),
        "findit": Shapes(findit.FindIt, ("colour", "shape", "existence")),
        "emoji": Drawings(package),
    }


@app.command()
@torch.no_grad()
def features(work: Path, package: Path) -> None:
    """Write the embedded tower's features of all scenes, half precision."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tiny = LlavaForConditionalGeneration.from_pretrained(
        path_of("tiny-llava"), dtype=torch.float32, trust_remote_code=False
    ).eval()
    for (name, source), (split, n) in itertools.product(sources(package).items(), N_SCENES.items()):
        parts = []
        for start in range(0, n, 50):
            images = np.stack([source.draw(split, i)[0] for i in range(start, start + 50)])
            hidden = tiny.model.vision_tower(pixels(images), output_hidden_states=True).hidden_states[-2]
            parts.append(hidden[:, 1:].half().numpy())
        np.save(work / f"features-{name}-{split}.npy", np.concatenate(parts))


def word_targets(model: nn.Module, tokenizer: Any) -> Callable[[list[tuple[str, str]]], Tensor]:
    """What `words` wants of the rows of a scene, (N, D): sums of embeddings, as long as one embedding."""
    table = model.get_input_embeddings().weight.detach().float()

    @functools.cache
    def embedded(word: str) -> Tensor:
        # Within a sentence a word is spelled with a space before it, at the start of an answer without.
        spelled = [tokenizer(space + word, add_special_tokens=False)["input_ids"] for space in (" ", "")]
        return torch.stack([table[ids].mean(0) for ids in spelled]).mean(0)

    rows, columns = (torch.stack([embedded(w) for w in pair]) for pair in (("top", "bottom"), ("left", "right")))
    half = (torch.arange(GRID) >= GRID // 2).long()
    place = (rows[half][:, None] + columns[half][None]).flatten(0, 1)

    def targets(said: list[tuple[str, str]]) -> Tensor:
        return (torch.stack([embedded(first) + embedded(second) for first, second in said]) + place) / 2

    return targets


class Trainer(LanguageTrainer):
    """The projector in float32, the frozen language model in bfloat16."""

    def __init__(self, model: nn.Module, processor: Any):
        self.processor = processor
        before, self.after = self._prompt("QUESTION").split(real.IMAGE)
        super().__init__(model, self._ids(before))
        self.language_model.requires_grad_(False).to(torch.bfloat16)

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pack(self, questions: list[list[tuple[str, str, str]]]) -> dict[str, Tensor]:
        """All questions of each picture in one row, in the words of the chat template."""
        stop = self.processor.tokenizer.eos_token_id

        def turn(question: str, answer: str) -> tuple[list[int], list[int]]:
            return self._ids(self.after.replace("QUESTION", question)), [*self._ids(answer), stop]

        return pack(questions, turn, stop)

    def forward(self, x: Tensor, kept: Tensor, contiguous: bool, text: dict[str, Tensor]) -> Tensor:
        """Logits at the answered positions, (number of answered tokens, vocabulary)."""
        visual = self.projector(x).to(torch.bfloat16)
        return self.answers(visual, kept, torch.ones_like(kept, dtype=torch.bool), contiguous, text).float()

    @torch.no_grad()
    def accuracy(self, x: np.ndarray, questions: list[list], n_keep: int) -> str:
        """Whole answers right under teacher forcing, from so many random tokens in contiguous positions."""
        right: dict[str, list[bool]] = {}
        generator = torch.Generator().manual_seed(0)
        for i in range(0, len(x), 10):
            part, asked = torch.from_numpy(np.float32(x[i : i + 10])), questions[i : i + 10]
            kept = torch.rand(len(part), N_VISUAL, generator=generator).topk(n_keep).indices.sort().values
            text = self.pack(asked)
            tally(right, self(part, kept, n_keep < N_VISUAL, text), text, asked)
        return f"{n_keep}: " + " ".join(f"{k} {np.mean(v):.3f}" for k, v in right.items())


class Scenes:
    """Features and contents of a split of all sources together."""

    def __init__(self, work: Path, package: Path, split: str):
        self.sources = sources(package)
        self.x = [np.load(work / f"features-{name}-{split}.npy", mmap_mode="r") for name in self.sources]
        self.shown = [
            [source.draw(split, i)[1] for i in range(len(x))]
            for source, x in zip(self.sources.values(), self.x, strict=True)
        ]

    def pick(self, rng: np.random.Generator, n: int) -> tuple[Tensor, list[tuple[Source, Any]]]:
        """Features (n, N, 128) of scenes drawn at random, and for each where it is from and what it shows."""
        own = list(self.sources.values())
        chosen = [(k, int(rng.integers(len(self.x[k])))) for k in rng.choice(len(own), n, p=SHARES)]
        x = np.stack([self.x[k][i] for k, i in chosen])
        return torch.from_numpy(x).float(), [(own[k], self.shown[k][i]) for k, i in chosen]


def _begin(gguf: Path, seed: int) -> tuple[Trainer, nn.Module, np.random.Generator]:
    rank, _ = start_processes(seed)
    model, processor = real.build(*real.read_gguf(gguf))
    return Trainer(model, processor), model, np.random.default_rng((seed, 7, rank))


def _report(trainer: Trainer, work: Path, package: Path, n_scenes: int) -> Callable[[int], str]:
    """Saves the projector and tells its accuracy on the first validation scenes of every source."""
    scenes, asked = Scenes(work, package, "validation"), np.random.default_rng((0, 8))
    sets = [
        (name, x[:n_scenes], [source.ask(asked, s) for s in shown[:n_scenes]])
        for (name, source), x, shown in zip(scenes.sources.items(), scenes.x, scenes.shown, strict=True)
    ]

    def save(_: int) -> str:
        torch.save(trainer.projector.state_dict(), work / "projector.pt")
        sizes = (N_VISUAL, N_VISUAL // 4)
        return "".join(f"\n  {name} {trainer.accuracy(x, q, n)}" for name, x, q in sets for n in sizes)

    return save


@app.command()
def words(work: Path, package: Path, gguf: Path, steps: int = 1000, lr: float = 2e-3, seed: int = 0) -> None:
    """Start the projector from words: a patch becomes what says what it shows and where."""
    trainer, model, rng = _begin(gguf, seed)
    targets, scenes = word_targets(model, trainer.processor.tokenizer), Scenes(work, package, "train")

    def loss(_: nn.Module) -> Tensor:
        x, shown = scenes.pick(rng, 16)
        wanted = torch.stack([targets(source.says(s)) for source, s in shown])
        return F.mse_loss(trainer.projector(x), wanted) * wanted.shape[-1]

    optimise(trainer, loss, _report(trainer, work, package, 20), steps, lr, every=steps)


@app.command()
def questions(
    work: Path,
    package: Path,
    gguf: Path,
    steps: int = 1600,
    lr: float = 1e-3,
    batch: int = 4,
    seed: int = 0,
    stop_at: int = 0,
) -> None:
    """Train the projector through the frozen language model, from where `words` left it."""
    trainer, _, rng = _begin(gguf, seed)
    trainer.projector.load_state_dict(torch.load(work / "projector.pt"))
    torch.manual_seed(int(rng.integers(2**31)))
    scenes = Scenes(work, package, "train")

    def loss(model: nn.Module) -> Tensor:
        x, shown = scenes.pick(rng, batch)
        text = trainer.pack([source.ask(rng, s) for source, s in shown])
        kept, contiguous = draw_kept(rng, x, drops=True)
        return F.cross_entropy(model(x, kept, contiguous, text), text["target"][text["target"] != -100])

    optimise(trainer, loss, _report(trainer, work, package, 20), steps, lr, 50, stop_at, 30)


@app.command()
def export(work: Path, out: Path = real.PARTS) -> None:
    """Write what was trained, half precision."""
    weights = torch.load(work / "projector.pt")
    save_file({name: w.half().contiguous() for name, w in weights.items()}, out / "projector.safetensors")


if __name__ == "__main__":
    app()
