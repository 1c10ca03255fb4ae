"""Train the embedded model: seeded, step-scheduled, two CPU processes, resumable by stage.

    python -m tokprune.eval.models.training.train data DIR
    torchrun --nproc_per_node 2 -m tokprune.eval.models.training.train tower DIR
    python -m tokprune.eval.models.training.train features DIR
    torchrun --nproc_per_node 2 -m tokprune.eval.models.training.train language DIR
    python -m tokprune.eval.models.training.train export DIR eval/models/tiny-llava

The tower learns from labels per patch (what shape, what colour, where the centre is, where the patch lies) and
from what its [CLS] token can tell about the whole picture; then it is frozen. The language model and the
projector learn from questions and answers on its features. After a first part, three of four steps drop most
visual tokens, by subsets that favour no method, half of the time with contiguous and half with the original
positions: a language model that only ever saw complete pictures answers nonsense on pruned ones, whatever
selected the tokens.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_cosine_schedule_with_warmup

from ...tasks import findit
from ...tasks.easyvqa import EasyVQA
from . import train_next
from .language import LanguageTrainer, answer_accuracy, draw_kept, initialise, pack, without_easy
from .recipe import BOS, EOS, IMAGE, N_VISUAL, PAD, build_model, build_processor
from .tower import (
    Scenes,
    TowerTrainer,
    easyvqa_label,
    easyvqa_questions,
    pixels,
    scene_labels,
    tower_accuracy,
    tower_loss,
)

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(train_next.app, name="next", help="The any-resolution model, from the first model's parts.")
N_SCENES = {"train": 36_000, "crowded": 12_000, "validation": 400}
EASYVQA_VALIDATION = 400  # the last pictures of the package's training split


def _draw_part(part: tuple[str, int, int]) -> tuple[np.ndarray, list]:
    split, start, stop = part
    drawn = [findit.draw(split, i) for i in range(start, stop)]
    return np.stack([image for image, _ in drawn]), [shapes for _, shapes in drawn]


@app.command()
def data(work: Path) -> None:
    """Draw the scenes and scale the easy-VQA training pictures into DIR."""
    work.mkdir(parents=True, exist_ok=True)
    for split, n in N_SCENES.items():
        parts = [(split, i, min(i + 1000, n)) for i in range(0, n, 1000)]
        with ProcessPoolExecutor(2) as pool:
            images, shapes = zip(*pool.map(_draw_part, parts), strict=True)
        np.save(work / f"{split}.npy", np.concatenate(images))
        torch.save([s for part in shapes for s in part], work / f"{split}.pt")
    task = EasyVQA("train")
    ids = sorted({int(s.image_id) for s in task.samples()})
    size = (findit.SIZE, findit.SIZE)
    np.save(work / "easyvqa.npy", np.stack([np.asarray(task.image(str(i)).resize(size, 3)) for i in ids]))


@app.command()
def tower(
    work: Path, steps: int = 9000, lr: float = 1.1e-3, per_process: int = 8, resume: bool = False, seed: int = 0
) -> None:
    """Train the vision tower; best started with torchrun. With --resume it goes on from the last one."""
    rank, _ = start_processes(seed)
    trainer = TowerTrainer(build_model().model.vision_tower)
    if resume:
        trainer.tower.load_state_dict(torch.load(work / "tower.pt"))
    train, crowded, valid = (Scenes(work, s) for s in ("train", "crowded", "validation"))
    easy, labels = np.load(work / "easyvqa.npy", mmap_mode="r"), [easyvqa_label(q) for q in easyvqa_questions()]
    rng = np.random.default_rng((seed, rank, int(resume)))
    n_easy = max(1, per_process // 8)
    n_crowded = (per_process - n_easy) // 2

    def batch() -> tuple[Tensor, list, Tensor]:
        a = rng.integers(0, len(train.images), per_process - n_easy - n_crowded)
        b = rng.integers(0, len(crowded.images), n_crowded)
        e = rng.integers(0, len(easy) - EASYVQA_VALIDATION, n_easy)
        images = np.concatenate([train.images[a], crowded.images[b], easy[e]])
        scene = [scene_labels(s) for s in [train.shapes[i] for i in a] + [crowded.shapes[i] for i in b]]
        return pixels(images), scene, torch.tensor([labels[i] for i in e])

    def loss(model: nn.Module) -> Tensor:
        x, scene, named = batch()
        logits = model(x, len(scene))
        return tower_loss(logits, torch.stack([w for w, _ in scene]), torch.stack([p for _, p in scene]), named)

    def save(step: int) -> str:
        torch.save(trainer.tower.state_dict(), work / "tower.pt")
        return tower_accuracy(trainer, valid)

    optimise(trainer, loss, save, steps, lr, every=500)


def start_processes(seed: int) -> tuple[int, int]:
    """(rank, world size); one thread each, the gloo group started where there are several."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(seed)  # the same initial weights in every process
    return rank, world


def optimise(
    model: nn.Module, loss_of, save, steps: int, lr: float, every: int, stop_at: int = 0, warm_up: int = 100
) -> None:
    """AdamW with warm-up and a cosine over `steps`; rank 0 saves and reports every so many; may stop before."""
    parallel = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimiser, warm_up, int(steps * 1.02))
    started, losses = time.time(), []
    for step in range(1, (stop_at or steps) + 1):
        loss = loss_of(parallel)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if rank == 0 and (step % every == 0 or step == (stop_at or steps)):
            model.eval()
            typer.echo(f"step {step} {time.time() - started:.0f} s loss {np.mean(losses[-every:]):.4f} {save(step)}")
            model.train()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@app.command()
@torch.no_grad()
def features(work: Path) -> None:
    """Write the frozen tower's features of every training picture, half precision."""
    torch.set_num_threads(2)
    tower = build_model().model.vision_tower.eval()
    tower.load_state_dict(torch.load(work / "tower.pt"))
    for name in ("validation", "easyvqa", "train"):
        images = np.load(work / f"{name}.npy", mmap_mode="r")
        shape = (len(images), N_VISUAL, 128)
        out = np.lib.format.open_memmap(work / f"features-{name}.npy", "w+", np.float16, shape)
        for i in range(0, len(images), 64):
            hidden = tower(pixels(images[i : i + 64]), output_hidden_states=True).hidden_states[-2]
            out[i : i + 64] = hidden[:, 1:].numpy()
        out.flush()


@app.command()
def language(
    work: Path,
    steps: int = 9000,
    lr: float = 1.3e-3,
    per_process: int = 8,
    drop_from: float = 0.1,
    skip_easy: float = 0.0,
    resume: bool = False,
    stop_at: int = 0,
    seed: int = 0,
) -> None:
    """Train projector and language model on cached features; best started with torchrun.

    Tokens are dropped from `drop_from` of the steps on: before that, the model learns to find what is asked for.
    With `skip_easy` above 0, three questions of each kind are asked of a picture instead of two, and that share of
    those about colours and shapes, which are learned first, is left out.
    """
    rank, _ = start_processes(seed)
    model = build_model()
    trainer = LanguageTrainer(model)
    if resume:
        model.load_state_dict(torch.load(work / "language.pt"))
    else:
        initialise(trainer)
    scenes, valid = Scenes(work, "train"), Scenes(work, "validation")
    x_scenes, x_easy, x_valid = (
        np.load(work / f"features-{n}.npy", mmap_mode="r") for n in ("train", "easyvqa", "validation")
    )
    easy = easyvqa_questions()
    rng, n_easy = np.random.default_rng((seed, rank, 1 + resume)), max(1, per_process // 6)
    torch.manual_seed(1000 * seed + rank)
    asked = np.random.default_rng((seed, 2))
    sets = [
        (x_valid, [findit.ask(asked, s) for s in valid.shapes]),
        (x_easy[-EASYVQA_VALIDATION:], [q[:8] for q in easy[-EASYVQA_VALIDATION:]]),
    ]

    done = 0

    def loss(parallel: nn.Module) -> Tensor:
        nonlocal done
        done += 1
        a = rng.integers(0, len(x_scenes), per_process - n_easy)
        e = rng.integers(0, len(x_easy) - EASYVQA_VALIDATION, n_easy)
        questions = [findit.ask(rng, scenes.shapes[i], rounds=3 if skip_easy else 2) for i in a]
        questions = [without_easy(rng, q, skip_easy) for q in questions] if skip_easy else questions
        questions += [[easy[i][j] for j in rng.permutation(len(easy[i]))[:10]] for i in e]
        x = torch.from_numpy(np.concatenate([x_scenes[a], x_easy[e]])).float()
        kept, contiguous = draw_kept(rng, x, done > drop_from * steps)
        text = pack(questions)
        return F.cross_entropy(parallel(x, kept, contiguous, text), text["target"][text["target"] != -100])

    def save(step: int) -> str:
        torch.save(model.state_dict(), work / "language.pt")
        n_some = N_VISUAL // 4
        return f"| {answer_accuracy(trainer, sets, N_VISUAL)} | {n_some}: {answer_accuracy(trainer, sets, n_some)}"

    optimise(trainer, loss, save, steps, lr, every=500, stop_at=stop_at)


def rewrite_json(path: Path, **values: object) -> None:
    """Set top-level values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


def with_nested_tower_names(path: Path) -> None:
    """Rename CLIP weights as releases 4 of transformers (and vLLM) spell them; releases 5 read both."""
    weights = load_file(path)
    new, old = "vision_tower.", "vision_tower.vision_model."
    renamed = {(k.replace(new, old) if new in k and old not in k else k): w for k, w in weights.items()}
    save_file(renamed, path, metadata={"format": "pt"})


@app.command()
def export(work: Path, out: Path) -> None:
    """Put tower and language model together and save model and processor, half precision."""
    model = build_model()
    model.load_state_dict(torch.load(work / "language.pt"))
    model.model.vision_tower.load_state_dict(torch.load(work / "tower.pt"))
    write_model(model, build_processor(), "CLIPImageProcessor", out)


def write_model(model: nn.Module, processor, image_processor_type: str, out: Path) -> None:
    """Save model and processor, half precision, as releases 4 and 5 of transformers read them."""
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_length=None)
    model.half().save_pretrained(out)
    with_nested_tower_names(out / "model.safetensors")
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)
    # Releases 4 of transformers look for the image processor in a file of its own, and know these classes.
    rewrite_json(out / "preprocessor_config.json", image_processor_type=image_processor_type)
    special = {"image_token": "<image>"}
    rewrite_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=special)
    total = sum(f.stat().st_size for f in out.iterdir())
    typer.echo(f"{total / 1e6:.1f} MB, image token {IMAGE}, in {out}")


if __name__ == "__main__":
    app()
