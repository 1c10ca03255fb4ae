"""Train the embedded model: seeded, step-scheduled, two CPU processes, resumable by stage.

    python -m tokprune.eval.models.train data     --work DIR
    torchrun --nproc_per_node 2 -m tokprune.eval.models.train tower    --work DIR
    python -m tokprune.eval.models.train features --work DIR
    torchrun --nproc_per_node 2 -m tokprune.eval.models.train language --work DIR
    python -m tokprune.eval.models.train export   --work DIR --out eval/models/tiny-llava

The tower learns from labels per patch (what shape, what colour, where the centre is) and from what its [CLS]
token can tell about the whole picture; then it is frozen. The language model and the projector learn from
questions and answers on its features. In three of four steps most visual tokens are dropped, by subsets that
favour no method, half of the time with contiguous and half with the original positions: a language model
that only ever saw complete pictures answers nonsense on pruned ones, whatever selected the tokens.
"""

from __future__ import annotations

import json
import math
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

from ..tasks import findit
from ..tasks.easyvqa import EasyVQA
from .recipe import (
    ASSISTANT,
    BOS,
    EASYVQA_COLOURS,
    EASYVQA_SHAPES,
    EOS,
    GRID,
    IMAGE,
    N_VISUAL,
    PAD,
    PATCH_SIZE,
    USER,
    WORD_IDS,
    build_model,
    build_processor,
)

app = typer.Typer(add_completion=False, no_args_is_help=True)
N_SCENES = {"train": 36_000, "crowded": 12_000, "validation": 400}
EASYVQA_VALIDATION = 400  # the last pictures of the package's training split
COLOURS, SHAPES = list(findit.COLOURS), list(findit.SHAPES)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
N_DENSE = len(SHAPES) + 1 + len(COLOURS) + 1 + 1  # shape or none, colour or none, centre


# ---------------------------------------------------------------------------------------------- data


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


class Scenes:
    """Pictures and shapes of a split, as `data` wrote them."""

    def __init__(self, work: Path, split: str):
        self.images = np.load(work / f"{split}.npy", mmap_mode="r")
        self.shapes = torch.load(work / f"{split}.pt", weights_only=False)


def easyvqa_questions() -> list[list[tuple[str, str, str]]]:
    """(question, answer, kind) by picture of the easy-VQA training split."""
    questions: dict[int, list] = {}
    for s in EasyVQA("train").samples():
        questions.setdefault(int(s.image_id), []).append((s.question, s.answer, "easyvqa"))
    return [questions[i] for i in sorted(questions)]


def pixels(images: np.ndarray) -> Tensor:
    """(B, 96, 96, 3) uint8 -> (B, 3, 96, 96) as CLIP's image processor makes it."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return ((x - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------------------- tower


def scene_labels(shapes: list[findit.Shape]) -> tuple[Tensor, Tensor]:
    """What [CLS] should tell, (41,) of 0/1: pairs, shapes, colours. What each patch should tell, (3, N)."""
    picture = torch.zeros(len(SHAPES), len(COLOURS))
    patches = torch.stack(
        [torch.full((GRID, GRID), len(SHAPES)), torch.full((GRID, GRID), len(COLOURS)), torch.zeros(GRID, GRID)]
    ).long()
    best = torch.full((GRID, GRID), 0.25)
    edges = torch.arange(GRID) * PATCH_SIZE
    for s in shapes:
        kind, colour = SHAPES.index(s.kind), COLOURS.index(s.colour)
        picture[kind, colour] = 1

        def overlap(centre: float, width: float = s.width) -> Tensor:
            low, high = edges.clamp(min=centre - width / 2), (edges + PATCH_SIZE).clamp(max=centre + width / 2)
            return (high - low).clamp(min=0) / PATCH_SIZE

        cover = overlap(s.y)[:, None] * overlap(s.x)[None]
        covered = cover > best
        best[covered], patches[0][covered], patches[1][covered] = cover[covered], kind, colour
        patches[2][int(s.y // PATCH_SIZE), int(s.x // PATCH_SIZE)] = 1
    whole = torch.cat([picture.flatten(), picture.amax(1), picture.amax(0)])
    return whole, patches.flatten(1)


def easyvqa_label(questions: list[tuple[str, str, str]]) -> tuple[int, int]:
    """Shape and colour of the one object, where the questions tell; -100 elsewhere."""
    shape = colour = -100
    for question, answer, _ in questions:
        words = question.rstrip("?").split()
        truth = answer if answer not in ("yes", "no") else None
        if truth is None and (answer == "yes") != ("not" in words):
            truth = next((w for w in words if w in EASYVQA_SHAPES + EASYVQA_COLOURS), None)
        if truth in EASYVQA_SHAPES:
            shape = EASYVQA_SHAPES.index(truth)
        elif truth in EASYVQA_COLOURS:
            colour = EASYVQA_COLOURS.index(truth)
    return shape, colour


class TowerTrainer(nn.Module):
    """The tower with linear heads on [CLS] (last layer) and on every patch (the layer LLaVA reads)."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        n_whole = len(SHAPES) * len(COLOURS) + len(SHAPES) + len(COLOURS)
        self.whole, self.easy = nn.Linear(128, n_whole), nn.Linear(128, len(EASYVQA_SHAPES) + len(EASYVQA_COLOURS))
        self.dense = nn.Linear(128, N_DENSE)

    def forward(self, x: Tensor, n_scenes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits for the whole scene, for the easy-VQA object, and for every patch of the scenes."""
        out = self.tower(x, output_hidden_states=True)
        cls, patches = out.pooler_output, out.hidden_states[-2][:n_scenes, 1:]
        return self.whole(cls[:n_scenes]), self.easy(cls[n_scenes:]), self.dense(patches)


def tower_loss(logits: tuple[Tensor, Tensor, Tensor], whole: Tensor, patches: Tensor, easy: Tensor) -> Tensor:
    """Binary losses on [CLS], cross entropies on patches and on easy-VQA's object."""
    n_s, n_c = len(SHAPES) + 1, len(COLOURS) + 1
    shape, colour, centre = logits[2].split([n_s, n_c, 1], -1)
    background = torch.ones(n_s).index_fill(0, torch.tensor(n_s - 1), 0.15)
    loss = F.binary_cross_entropy_with_logits(logits[0], whole, weight=1 + 2 * whole)
    dense = F.cross_entropy(shape.flatten(0, 1), patches[:, 0].flatten(), background)
    dense = dense + F.cross_entropy(colour.flatten(0, 1), patches[:, 1].flatten())
    dense = dense + F.binary_cross_entropy_with_logits(
        centre[..., 0], patches[:, 2].float(), pos_weight=torch.tensor(8.0)
    )
    easy_shape, easy_colour = logits[1].split([len(EASYVQA_SHAPES), len(EASYVQA_COLOURS)], -1)
    named = [F.cross_entropy(o, t) for o, t in ((easy_shape, easy[:, 0]), (easy_colour, easy[:, 1])) if (t >= 0).any()]
    return loss + 0.5 * dense + 0.25 * sum(named) + 0 * logits[1].sum()


@torch.no_grad()
def tower_accuracy(trainer: TowerTrainer, scenes: Scenes) -> str:
    """Shape and colour at the centre patch of validation scenes."""
    right = torch.zeros(3)
    for i in range(0, len(scenes.images), 50):
        out = trainer(pixels(scenes.images[i : i + 50]), len(scenes.images[i : i + 50]))[2]
        truth = torch.stack([scene_labels(s)[1] for s in scenes.shapes[i : i + 50]])
        centre = truth[:, 2] > 0
        n_s = len(SHAPES) + 1
        shape, colour = out[..., : n_s - 1].argmax(-1), out[..., n_s : n_s + len(COLOURS)].argmax(-1)
        right += torch.tensor(
            [(shape == truth[:, 0])[centre].sum(), (colour == truth[:, 1])[centre].sum(), centre.sum()]
        )
    return f"shape {right[0] / right[2]:.3f} colour {right[1] / right[2]:.3f}"


@app.command()
def tower(work: Path, steps: int = 7000, lr: float = 1.1e-3, per_process: int = 8, seed: int = 0) -> None:
    """Train the vision tower; best started with torchrun."""
    rank, _ = start_processes(seed)
    trainer = TowerTrainer(build_model().model.vision_tower)
    train, crowded, valid = (Scenes(work, s) for s in ("train", "crowded", "validation"))
    easy, labels = np.load(work / "easyvqa.npy", mmap_mode="r"), [easyvqa_label(q) for q in easyvqa_questions()]
    rng = np.random.default_rng((seed, rank))
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


# ---------------------------------------------------------------------------------------- processes


def start_processes(seed: int) -> tuple[int, int]:
    """(rank, world size); one thread each, the gloo group started where there are several."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(seed)  # the same initial weights in every process
    return rank, world


def optimise(model: nn.Module, loss_of, save, steps: int, lr: float, every: int) -> None:
    """AdamW with warm-up and a cosine; rank 0 saves and reports every so many steps."""
    parallel = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimiser, 100, int(steps * 1.02))
    started, losses = time.time(), []
    for step in range(1, steps + 1):
        loss = loss_of(parallel)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if rank == 0 and (step % every == 0 or step == steps):
            model.eval()
            typer.echo(f"step {step} {time.time() - started:.0f} s loss {np.mean(losses[-every:]):.4f} {save(step)}")
            model.train()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------- language


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


def encode(text: str) -> list[int]:
    """Word ids; an unknown word is an error here."""
    return [WORD_IDS[w] for w in text.replace("?", " ?").split()]


def pack(questions: list[list[tuple[str, str, str]]]) -> dict[str, Tensor]:
    """All questions of a picture in one row; each sees the picture and itself only.

    Returns `ids`, `offset` (place within its question), `block` (question, from 1; 0 is padding) and
    `target` (the next token where it is answered for, -100 elsewhere), each (B, L).
    """
    rows = []
    for asked in questions:
        row: list[tuple[int, int, int, int]] = []
        for block, (question, answer, _) in enumerate(asked, 1):
            prompt, reply = [*encode(question), ASSISTANT], [*encode(answer), EOS]
            targets = [-100] * (len(prompt) - 1) + reply + [-100]
            row += [(t, i, block, target) for i, (t, target) in enumerate(zip(prompt + reply, targets, strict=True))]
        rows.append(row)
    length = max(map(len, rows))
    filled = torch.tensor([row + [(PAD, 0, 0, -100)] * (length - len(row)) for row in rows])
    return dict(zip(("ids", "offset", "block", "target"), filled.unbind(-1), strict=True))


def draw_kept(rng: np.random.Generator, x: Tensor, drops: bool) -> tuple[Tensor, bool]:
    """Which tokens stay, (B, K) ascending, and whether their positions become contiguous.

    A quarter of the steps, and all that do not drop yet, keep all. Else K is log-uniform and the subset is
    uniform, a smooth blob, or the top of a random direction in feature space: no method's own choice.
    """
    if not drops or rng.random() < 0.25:
        return torch.arange(N_VISUAL).expand(len(x), -1), False
    n_keep = 0 if rng.random() < 0.04 else round(math.exp(rng.uniform(math.log(3), math.log(N_VISUAL))))
    kind = rng.integers(3)
    if kind == 0:
        score = torch.rand(len(x), N_VISUAL)
    elif kind == 1:
        blob = F.interpolate(torch.rand(len(x), 1, 5, 5), size=(GRID, GRID), mode="bicubic")
        score = blob.flatten(1)
    else:
        score = torch.einsum("bnd,bd->bn", x - x.mean(1, keepdim=True), torch.randn(len(x), x.shape[-1]))
    return score.topk(n_keep, 1).indices.sort(1).values, bool(rng.random() < 0.5)


class LanguageTrainer(nn.Module):
    """Projector and language model on features of the frozen tower, packed questions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.projector, self.language_model = model.model.multi_modal_projector, model.model.language_model
        self.prefix = torch.tensor([BOS, USER])

    def forward(self, x: Tensor, kept: Tensor, contiguous: bool, text: dict[str, Tensor]) -> Tensor:
        """Logits at the answered positions, (number of answered tokens, vocabulary)."""
        words = self.language_model.embed_tokens
        batch, n_keep = kept.shape
        visual = self.projector(x).gather(1, kept[..., None].expand(-1, -1, words.embedding_dim))
        embeds = torch.cat([words(self.prefix.expand(batch, 2)), visual, words(text["ids"])], 1)
        places = torch.arange(n_keep).expand(batch, -1) if contiguous else kept
        text_start = 2 + (n_keep if contiguous else N_VISUAL)
        positions = torch.cat(
            [self.prefix.new_tensor([0, 1]).expand(batch, 2), places + 2, text["offset"] + text_start], 1
        )
        block = F.pad(text["block"], (2 + n_keep, 0), value=-1)  # -1: the shared prefix
        sees = (block[:, None] == block[:, :, None]) | (block[:, None] == -1)
        mask = (sees & torch.ones(sees.shape[1:], dtype=torch.bool).tril())[:, None]
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[:, 2 + n_keep :]
        return out[text["target"] != -100] @ words.weight.T


@torch.no_grad()
def answer_accuracy(trainer: LanguageTrainer, sets: list[tuple[np.ndarray, list]], n_keep: int) -> str:
    """Whole answers right under teacher forcing (the same as greedy decoding), by kind."""
    right: dict[str, list[bool]] = {}
    generator = torch.Generator().manual_seed(0)
    for x, questions in sets:
        for i in range(0, len(x), 50):
            part, text = torch.from_numpy(x[i : i + 50]).float(), pack(questions[i : i + 50])
            kept = torch.rand(len(part), N_VISUAL, generator=generator).topk(n_keep).indices.sort().values
            hit = trainer(part, kept, n_keep < N_VISUAL, text).argmax(-1) == text["target"][text["target"] != -100]
            rows, cols = (text["target"] != -100).nonzero().T
            for row, asked in enumerate(questions[i : i + 50]):
                blocks = text["block"][row, cols[rows == row]]
                for b, (_, _, kind) in enumerate(asked, 1):
                    right.setdefault(kind, []).append(bool(hit[rows == row][blocks == b].all()))
    mean = np.mean([np.mean(right[k]) for k in findit.KINDS])
    return f"findit {mean:.3f} " + " ".join(f"{k} {np.mean(v):.3f}" for k, v in right.items())


@app.command()
def language(
    work: Path, steps: int = 8000, lr: float = 1.3e-3, per_process: int = 8, drop_from: float = 0.35, seed: int = 0
) -> None:
    """Train projector and language model on cached features; best started with torchrun.

    Tokens are dropped from `drop_from` of the steps on: before that, the model learns to find what is asked for.
    """
    rank, _ = start_processes(seed)
    model = build_model()
    trainer = LanguageTrainer(model)
    scenes, valid = Scenes(work, "train"), Scenes(work, "validation")
    x_scenes, x_easy, x_valid = (
        np.load(work / f"features-{n}.npy", mmap_mode="r") for n in ("train", "easyvqa", "validation")
    )
    easy = easyvqa_questions()
    rng, n_easy = np.random.default_rng((seed, rank, 1)), max(1, per_process // 6)
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
        questions = [findit.ask(rng, scenes.shapes[i], rounds=2) for i in a]
        questions += [[easy[i][j] for j in rng.permutation(len(easy[i]))[:10]] for i in e]
        x = torch.from_numpy(np.concatenate([x_scenes[a], x_easy[e]])).float()
        kept, contiguous = draw_kept(rng, x, done > drop_from * steps)
        text = pack(questions)
        return F.cross_entropy(parallel(x, kept, contiguous, text), text["target"][text["target"] != -100])

    def save(step: int) -> str:
        torch.save(model.state_dict(), work / "language.pt")
        n_some = N_VISUAL // 4
        return f"| {answer_accuracy(trainer, sets, N_VISUAL)} | {n_some}: {answer_accuracy(trainer, sets, n_some)}"

    optimise(trainer, loss, save, steps, lr, every=500)


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
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_length=None)
    model.half().save_pretrained(out)
    with_nested_tower_names(out / "model.safetensors")
    processor = build_processor()
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)
    # Releases 4 of transformers look for the image processor in a file of its own, and know these classes.
    rewrite_json(out / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    special = {"image_token": "<image>"}
    rewrite_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=special)
    total = sum(f.stat().st_size for f in out.iterdir())
    typer.echo(f"{total / 1e6:.1f} MB, image token {IMAGE}, in {out}")


if __name__ == "__main__":
    app()
