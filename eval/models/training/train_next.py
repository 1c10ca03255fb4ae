"""Train the embedded any-resolution model from the tower and the language model of the first one.

    python -m tokprune.eval.models.training.train next features DIR
    python -m tokprune.eval.models.training.train next language DIR
    python -m tokprune.eval.models.training.train next export DIR eval/models/tiny-llava-next

DIR holds `tower.pt` and `language.pt` of the first model. The tower stays as it is: it knows what shapes look
like in crops. The language model goes on from what it knows of 144 tokens, with up to 744 in packed order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ...tasks import findit, findit_hd
from .anyres import N_CROPS, AnyResTrainer, accuracy, draw_kept, pack_rows, places
from .language import pack
from .recipe import N_VISUAL, build_model, build_next_image_processor, build_next_model, build_next_processor

app = typer.Typer(add_completion=False, no_args_is_help=True)
N_SCENES = {"train": 8_000, "validation": 300}


@app.command()
@torch.no_grad()
def features(work: Path) -> None:
    """Draw the scenes and write the frozen tower's features of all their crops, half precision."""
    tower = build_model().model.vision_tower.eval()
    tower.load_state_dict(torch.load(work / "tower.pt"))
    processor = build_next_image_processor()
    for split in ("validation", "train"):
        shape = (N_SCENES[split], N_CROPS, N_VISUAL, 128)
        out = np.lib.format.open_memmap(work / f"features-hd-{split}.npy", "w+", np.float16, shape)
        for i in range(0, N_SCENES[split], 16):
            pictures = [findit_hd.draw(split, j)[0] for j in range(i, min(i + 16, N_SCENES[split]))]
            crops = torch.as_tensor(np.stack(processor(pictures, return_tensors="pt")["pixel_values"]))
            hidden = tower(crops.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
            out[i : i + 16] = hidden[:, 1:].unflatten(0, (-1, N_CROPS)).numpy()
        out.flush()
        typer.echo(f"{split}: {shape}")


@app.command()
def language(
    work: Path, steps: int = 5000, lr: float = 1e-3, batch: int = 8, seed: int = 0, resume: bool = False
) -> None:
    """Train projector, newline and language model; goes on from the first model's, or with --resume from its own."""
    from .train import optimise, start_processes

    rank, _ = start_processes(seed)
    model = build_next_model()
    first = "language-next.pt" if resume else "language.pt"
    model.load_state_dict(torch.load(work / first), strict=resume)
    if not resume:
        nn.init.normal_(model.model.image_newline, std=0.15)
    trainer = AnyResTrainer(model)
    x_train = np.load(work / "features-hd-train.npy", mmap_mode="r")
    shapes = [findit_hd.draw("train", i)[1] for i in range(len(x_train))]
    sets = validation_sets(work)
    by_size = [[i for i in range(len(x_train)) if findit_hd.size(i) == s] for s in findit_hd.SIZES]
    where = [places(model.model, s) for s in findit_hd.SIZES]
    rng = np.random.default_rng((seed, rank, 3 + resume))
    torch.manual_seed(2000 * seed + rank)

    def loss(parallel: nn.Module) -> Tensor:
        which = int(rng.choice(3, p=[0.5, 0.25, 0.25]))
        index = rng.choice(by_size[which], batch, replace=False)
        text = pack([findit.ask(rng, shapes[i], rounds=2, kinds=findit_hd.KINDS) for i in index])
        x, size = torch.from_numpy(x_train[index]).float(), findit_hd.SIZES[which]
        packed = pack_rows(model.model, x, size, torch.zeros(x.shape[-1]))
        kept, valid, contiguous = draw_kept(rng, packed, where[which])
        return F.cross_entropy(parallel(x, size, kept, valid, contiguous, text), text["target"][text["target"] != -100])

    def save(step: int) -> str:
        torch.save(model.state_dict(), work / "language-next.pt")
        return " ".join(
            [accuracy(trainer, sets, "all"), accuracy(trainer, sets, "random", 72)]
            + ([accuracy(trainer, sets, p) for p in ("thumbnail", "crops")] if step % 1000 == 0 else [])
        )

    optimise(trainer, loss, save, steps, lr, every=250)


def validation_sets(work: Path) -> list[tuple[tuple[int, int], np.ndarray, list]]:
    """(size, features, questions) of the validation scenes, by size."""
    x, asked = np.load(work / "features-hd-validation.npy", mmap_mode="r"), np.random.default_rng((0, 4))
    questions = [findit.ask(asked, findit_hd.draw("validation", i)[1], kinds=findit_hd.KINDS) for i in range(len(x))]
    sets = []
    for size in findit_hd.SIZES:
        index = [i for i in range(len(x)) if findit_hd.size(i) == size]
        sets.append((size, x[index], [questions[i] for i in index]))
    return sets


@app.command()
def export(work: Path, out: Path) -> None:
    """Put tower and language model together and save model and processor, half precision."""
    from .train import write_model

    model = build_next_model()
    model.load_state_dict(torch.load(work / "language-next.pt"))
    model.model.vision_tower.load_state_dict(torch.load(work / "tower.pt"))
    write_model(model, build_next_processor(), "LlavaNextImageProcessor", out)
