"""Train the embedded model of pictures of any size and of clips: seeded, step-scheduled, one process, resumable.

    python -m tokprune.eval.models.training.train_qwen tower DIR
    python -m tokprune.eval.models.training.train_qwen align DIR
    python -m tokprune.eval.models.training.train_qwen language DIR
    python -m tokprune.eval.models.training.train_qwen floors DIR
    python -m tokprune.eval.models.training.train_qwen export DIR eval/models/tiny-qwen

Its language model begins as that of tiny-llava. The tower learns from labels of patches (which shape, which colour,
does it stand still, move or come up) and then stays as it is while merger and language model learn from questions and
answers; at the end all of it learns together. Scenes and clips are drawn as they are needed. Visual tokens keep the
places that M-RoPE gives them when others are dropped: there are no contiguous ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ...tasks import findit
from .language import initialise
from .qwen import (
    FLOORS,
    N_SEEDS,
    Batch,
    Trainer,
    answer_accuracy,
    clip_batch,
    draw_kept,
    other_sizes,
    pack,
    patchify,
    picture_batch,
    question_floor,
    tower_accuracy,
    tower_loss,
    validation_batches,
)
from .recipe import GRID
from .recipe_qwen import BOS, EOS, MERGE, PAD, PATCH_SIZE, build_model, save_processor, start_from_llava
from .tower import pixels
from .train import rewrite_json

app = typer.Typer(add_completion=False, no_args_is_help=True)
LLAVA = Path(__file__).parents[1] / "tiny-llava" / "model.safetensors"
WARM_UP = 100


def build_trainer(seed: int) -> Trainer:
    """Random tower, language model of tiny-llava."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build_model()
    trainer = Trainer(model)
    initialise(trainer)
    start_from_llava(model, str(LLAVA))
    return trainer


def rate(step: int, steps: int, decay: float) -> float:
    """Share of the learning rate: a warm-up, a plateau, and a straight line to 0 over the last `decay` of the steps."""
    return min(1.0, step / WARM_UP, max(0.0, (steps - step) / max(1, decay * steps)))


def optimise(
    trainer: Trainer,
    work: Path,
    name: str,
    loss_of: Callable[[np.random.Generator, int], Tensor],
    report: Callable[[], str],
    steps: int,
    lr: float,
    decay: float,
    every: int,
    seed: int,
    resume: bool,
) -> None:
    """AdamW; saves and reports every so many steps, and goes on from there. Each step has a seed of its own."""
    weights = [p for p in trainer.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    path, first = work / f"{name}.pt", 1
    if resume:
        saved = torch.load(path)
        trainer.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"] + 1
    started, losses = time.time(), []
    for step in range(first, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = lr * rate(step, steps, decay)
        torch.manual_seed(1_000_003 * seed + step)
        loss = loss_of(np.random.default_rng((seed, len(name), step)), step)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % every == 0 or step == steps:
            trainer.eval()
            saved = {"weights": trainer.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            torch.save(saved, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
            told = report()
            typer.echo(f"step {step} {time.time() - started:.0f} s loss {np.mean(losses[-every:]):.4f} {told}")
            trainer.train()


@app.command()
def tower(
    work: Path,
    steps: int = 4000,
    lr: float = 1.2e-3,
    batch: int = 8,
    decay: float = 0.3,
    seed: int = 0,
    resume: bool = False,
    every: int = 250,
) -> None:
    """Train the tower on labels of patches: pictures, some of them crowded, and clips in turn."""
    work.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(seed)
    for part in (trainer.model.language_model, trainer.model.visual.merger):
        part.requires_grad_(False)
    valid = validation_batches(100)

    def loss(rng: np.random.Generator, step: int) -> Tensor:
        some = picture_batch(rng, batch, crowded=0.5) if step % 2 else clip_batch(rng, batch // 2)
        shown, _ = trainer.see(some)
        return tower_loss(shown, some.labels)

    optimise(
        trainer, work, "tower", loss, lambda: tower_accuracy(trainer, valid), steps, lr, decay, every, seed, resume
    )


@app.command()
def align(work: Path, steps: int = 800, lr: float = 2e-3, batch: int = 16, seed: int = 0, every: int = 200) -> None:
    """Train the merger to give the rows that tiny-llava gives, the mean over the patches of a token.

    The language model, which comes from there, then reads the new tower's pictures from the start.
    """
    trainer = build_trainer(seed)
    trainer.load_state_dict(torch.load(work / "tower.pt")["weights"], strict=False)
    trainer.requires_grad_(False)
    trainer.model.visual.merger.requires_grad_(True)
    teacher = LlavaForConditionalGeneration.from_pretrained(
        LLAVA.parent, trust_remote_code=False, dtype=torch.float32
    ).eval()
    valid = validation_batches(100)

    def loss(rng: np.random.Generator, step: int) -> Tensor:
        images = [findit.draw("train", int(i))[0] for i in rng.integers(100_000, N_SEEDS, batch)]
        pixel_values = pixels(np.stack(images))
        with torch.no_grad():
            rows = teacher.model.get_image_features(pixel_values).pooler_output
        rows = (
            torch.stack(list(rows))
            .unflatten(1, (GRID // MERGE, MERGE, GRID // MERGE, MERGE))
            .mean((2, 4))
            .flatten(1, 2)
        )
        grid = 1, GRID, GRID
        _, mine = trainer.see(Batch(patchify(np.stack(images)[:, None]), torch.empty(0), grid, False, []))
        return F.mse_loss(mine, rows) / rows.var()

    def report() -> str:
        return answer_accuracy(trainer, valid)

    optimise(trainer, work, "aligned", loss, report, steps, lr, 0.5, every, seed, False)


def drawn(rng: np.random.Generator, step: int, batch: int) -> Batch:
    """Pictures and clips in turn."""
    return picture_batch(rng, batch) if step % 2 else clip_batch(rng, batch)


@app.command()
def language(
    work: Path,
    steps: int = 5000,
    lr: float = 1e-3,
    batch: int = 8,
    drop_from: int = 400,
    tower_from: int = 100_000,
    decay: float = 0.3,
    seed: int = 0,
    resume: bool = False,
    every: int = 250,
) -> None:
    """Train on questions; tokens are dropped from step `drop_from` on, and the tower learns, too, from `tower_from`."""
    trainer = build_trainer(seed)
    if not resume:
        trainer.load_state_dict(torch.load(work / "aligned.pt")["weights"])
    valid = validation_batches(100)

    def loss(rng: np.random.Generator, step: int) -> Tensor:
        for part in (trainer.model.visual.patch_embed, trainer.model.visual.blocks):
            part.requires_grad_(step >= tower_from)
        some = drawn(rng, step, batch)
        frames, rows, columns = some.grid
        text = pack(some.questions)
        shown, visual = trainer.see(some)
        kept = draw_kept(rng, visual.detach(), (frames, rows // MERGE, columns // MERGE), step > drop_from)
        logits, place = trainer.answers(visual, some, kept, text)
        answered = F.cross_entropy(logits, text["target"][text["target"] != -100])
        return answered + 0.1 * place + 0.1 * tower_loss(shown, some.labels)

    def report() -> str:
        return f"| {answer_accuracy(trainer, valid)} | a quarter: {answer_accuracy(trainer, valid, 0.25)}"

    optimise(trainer, work, "language", loss, report, steps, lr, decay, every, seed, resume)


@app.command()
def floors(work: Path, n: int = 300) -> None:
    """Accuracy on validation: whole, from a share of the tokens, at other sizes, and of less than the picture or clip.

    Of both, `other` is that of another question. Of clips, `first` and `last` show that frame eight times, and `mixed`
    shows the frames in a random order. `question` is the most frequent answer to a question in the training split.
    """
    trainer = build_trainer(0)
    trainer.load_state_dict(torch.load(work / "language.pt")["weights"])
    trainer.eval()
    valid = validation_batches(n)
    for share in (1.0, 0.5, 0.25, 0.1):
        typer.echo(f"{share:.0%} of the tokens: {answer_accuracy(trainer, valid, share)}")
    for name, change in FLOORS.items():
        typer.echo(f"{name}: {answer_accuracy(trainer, [change(b) for b in valid])}")
    for some in other_sizes(n // 3):
        height, width = (side * PATCH_SIZE for side in some.grid[1:])
        typer.echo(f"height {height}, width {width}: {answer_accuracy(trainer, [some])}")
    typer.echo(f"question: {question_floor('findit', n)}, {question_floor('watchit', n)}")


@app.command()
def export(work: Path, out: Path) -> None:
    """Save model and processor, half precision."""
    trainer = build_trainer(0)
    trainer.load_state_dict(torch.load(work / "language.pt")["weights"])
    model = build_model()
    model.model.load_state_dict(trainer.model.state_dict())
    model.tie_weights()
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_length=None)
    model.half().save_pretrained(out)
    save_processor(out)
    # As for the other models: what releases 4 of transformers know by these names.
    special = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    rewrite_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=special)
    typer.echo(f"{sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB in {out}")


if __name__ == "__main__":
    app()
