"""Train the projector between the embedded tower and a pretrained language model, which both stay as they are.

    python -m tokprune.eval.models.training.train_real features DIR
    python -m tokprune.eval.models.training.train_real words DIR WHEEL_OR_GGUF
    python -m tokprune.eval.models.training.train_real questions DIR WHEEL_OR_GGUF
    python -m tokprune.eval.models.training.train_real export DIR

One process, one thread, seeded. `words` is a start that needs no language model: every patch becomes the sum of the
embeddings of the words that say its colour, its shape and its place. `questions` then asks the language model about
findone scenes, all questions of a scene in one row; three of four steps drop visual tokens by subsets that favour no
method, half of the time with contiguous positions, as for the embedded models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ...tasks import findit, findone
from .. import path_of, real
from .language import LanguageTrainer, draw_kept, pack, tally
from .recipe import GRID, N_VISUAL
from .tower import COLOURS, SHAPES, pixels, scene_labels
from .train import optimise, start_processes

app = typer.Typer(add_completion=False, no_args_is_help=True)
N_SCENES = {"train": 3_000, "validation": 100}
KINDS = (*findone.KINDS, "position")  # places are asked for, too, but are not learned in so few steps
BACKGROUND = "background"


@app.command()
@torch.no_grad()
def features(work: Path) -> None:
    """Write the embedded tower's features of findone scenes, half precision."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tiny = LlavaForConditionalGeneration.from_pretrained(
        path_of("tiny-llava"), dtype=torch.float32, trust_remote_code=False
    ).eval()
    for split, n in N_SCENES.items():
        parts = []
        for start in range(0, n, 50):
            images = np.stack([findone.draw(split, i)[0] for i in range(start, start + 50)])
            hidden = tiny.model.vision_tower(pixels(images), output_hidden_states=True).hidden_states[-2]
            parts.append(hidden[:, 1:].half().numpy())
        np.save(work / f"features-{split}.npy", np.concatenate(parts))


def word_targets(model: nn.Module, tokenizer: Any) -> Callable[[list[findit.Shape]], Tensor]:
    """What `words` wants of the rows of a scene, (N, D): sums of embeddings, as long as one embedding."""
    table = model.get_input_embeddings().weight.detach().float()

    def embedded(words: Sequence[str]) -> Tensor:
        # Within a sentence a word is spelled with a space before it, at the start of an answer without.
        spelled = [[tokenizer(space + w, add_special_tokens=False)["input_ids"] for space in (" ", "")] for w in words]
        return torch.stack([torch.stack([table[ids].mean(0) for ids in both]).mean(0) for both in spelled])

    none = embedded([BACKGROUND])
    shapes, colours = (torch.cat([embedded(words), none]) for words in (SHAPES, COLOURS))
    rows, columns = embedded(["top", "bottom"]), embedded(["left", "right"])
    half = (torch.arange(GRID) >= GRID // 2).long()
    place = (rows[half][:, None] + columns[half][None]).flatten(0, 1)

    def targets(scene: list[findit.Shape]) -> Tensor:
        kind, colour, _ = scene_labels(scene)[1]
        return (shapes[kind] + colours[colour] + place) / 2

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
            part, asked = torch.from_numpy(x[i : i + 10]).float(), questions[i : i + 10]
            kept = torch.rand(len(part), N_VISUAL, generator=generator).topk(n_keep).indices.sort().values
            text = self.pack(asked)
            tally(right, self(part, kept, n_keep < N_VISUAL, text), text, asked)
        return f"{n_keep}: " + " ".join(f"{k} {np.mean(v):.3f}" for k, v in right.items())


def _begin(gguf: Path, seed: int) -> tuple[Trainer, nn.Module, np.random.Generator]:
    start_processes(seed)
    model, processor = real.build(*real.read_gguf(gguf))
    return Trainer(model, processor), model, np.random.default_rng((seed, 7))


def _scenes(work: Path, split: str) -> tuple[np.ndarray, list[list[findit.Shape]]]:
    x = np.load(work / f"features-{split}.npy")
    return x, [findone.draw(split, i)[1] for i in range(len(x))]


def _report(trainer: Trainer, work: Path, n_scenes: int, sizes: Sequence[int]) -> Callable[[int], str]:
    """Saves the projector and tells its accuracy on the first validation scenes."""
    x, shapes = _scenes(work, "validation")
    asked = np.random.default_rng((0, 8))
    questions = [findit.ask(asked, s, kinds=KINDS) for s in shapes]

    def save(_: int) -> str:
        torch.save(trainer.projector.state_dict(), work / "projector.pt")
        return " | ".join(trainer.accuracy(x[:n_scenes], questions[:n_scenes], n) for n in sizes)

    return save


@app.command()
def words(work: Path, gguf: Path, steps: int = 600, lr: float = 2e-3, seed: int = 0) -> None:
    """Start the projector from words: a patch becomes what says its colour, shape and place."""
    trainer, model, rng = _begin(gguf, seed)
    targets = word_targets(model, trainer.processor.tokenizer)
    x, shapes = _scenes(work, "train")

    def loss(_: nn.Module) -> Tensor:
        chosen = rng.integers(0, len(x), 16)
        wanted = torch.stack([targets(shapes[i]) for i in chosen])
        return F.mse_loss(trainer.projector(torch.from_numpy(x[chosen]).float()), wanted) * wanted.shape[-1]

    optimise(trainer, loss, _report(trainer, work, 20, (N_VISUAL,)), steps, lr, every=steps // 2)


@app.command()
def questions(
    work: Path, gguf: Path, steps: int = 300, lr: float = 1e-3, batch: int = 4, seed: int = 0, stop_at: int = 0
) -> None:
    """Train the projector through the frozen language model, from where `words` left it."""
    trainer, _, rng = _begin(gguf, seed)
    trainer.projector.load_state_dict(torch.load(work / "projector.pt"))
    torch.manual_seed(3000 + seed)
    x, shapes = _scenes(work, "train")

    def loss(_: nn.Module) -> Tensor:
        chosen = rng.integers(0, len(x), batch)
        text = trainer.pack([findit.ask(rng, shapes[i], kinds=KINDS) for i in chosen])
        seen = torch.from_numpy(x[chosen]).float()
        kept, contiguous = draw_kept(rng, seen, drops=True)
        return F.cross_entropy(trainer(seen, kept, contiguous, text), text["target"][text["target"] != -100])

    optimise(trainer, loss, _report(trainer, work, 20, (N_VISUAL, N_VISUAL // 4)), steps, lr, 50, stop_at, 30)


@app.command()
def export(work: Path, out: Path = real.PARTS) -> None:
    """Write what was trained, half precision."""
    weights = torch.load(work / "projector.pt")
    save_file({name: w.half().contiguous() for name, w in weights.items()}, out / "projector.safetensors")


if __name__ == "__main__":
    app()
