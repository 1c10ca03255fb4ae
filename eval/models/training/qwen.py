"""What the model of pictures and clips learns from: batches of one size, labels of patches, packed questions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokprune.integrations.transformers import family_of
from torch import Tensor, nn

from ...tasks import findit, watchit
from .language import tally
from .recipe_qwen import ASSISTANT, BOS, END, EOS, MERGE, PAD, PATCH_SIZE, START, TOWER_WIDTH, USER, WORD_IDS, positions
from .tower import MEAN, STD

COLOURS, SHAPES = list(findit.COLOURS), list(findit.SHAPES)
STATES = ("still", "moves", "comes up", "comes up in the second frame")
HEADS = (len(SHAPES) + 1, len(COLOURS) + 1, len(STATES), 1)  # shape or none, colour or none, state, centre
SIZES = ((80, 80), (112, 112), (128, 128), (96, 128), (128, 96), (80, 112), (112, 80))  # beside 96 x 96
PLACES = (4, 8, 8)  # most steps of time, rows and columns of tokens
PLACE_LAYER = 3  # after which the language model should know where a token lies
SHARE_EASY = 0.35
N_SEEDS = 1_000_000  # of the training splits; the first 100,000 are not drawn from


@dataclass(frozen=True)
class Batch:
    """Pictures or clips of one size: patches (B, T * H * W, values), labels (B, 4, T * H * W), and questions."""

    patches: Tensor
    labels: Tensor
    grid: tuple[int, int, int]
    is_video: bool
    questions: list[list[tuple[str, str, str]]]


def patchify(frames: np.ndarray) -> Tensor:
    """(B, F, H, W, 3) uint8 -> (B, patches, values) in the order of Qwen2-VL's image processor.

    F is 1 for pictures, whose only frame is shown twice; else an even number.
    """
    x = ((torch.from_numpy(frames).float() / 255 - MEAN) / STD).permute(0, 1, 4, 2, 3)
    if x.shape[1] == 1:
        x = x.expand(-1, 2, -1, -1, -1)
    batch, n_frames, channels, height, width = x.shape
    rows, columns = height // PATCH_SIZE // MERGE, width // PATCH_SIZE // MERGE
    x = x.reshape(batch, n_frames // 2, 2, channels, rows, MERGE, PATCH_SIZE, columns, MERGE, PATCH_SIZE)
    return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch, -1, channels * 2 * PATCH_SIZE**2)


def by_patch(raster: np.ndarray) -> np.ndarray:
    """(..., T, H, W) -> (..., T * H * W) in the order of the processor: the patches of a token follow each other."""
    *lead, frames, rows, columns = raster.shape
    split = raster.reshape(*lead, frames, rows // MERGE, MERGE, columns // MERGE, MERGE)
    return np.swapaxes(split, -3, -2).reshape(*lead, -1)


def _overlap(low: float, width: float, n: int) -> np.ndarray:
    """Share of each of n patches that an interval covers."""
    edges = np.arange(n) * PATCH_SIZE
    return np.clip(np.minimum(edges + PATCH_SIZE, low + width) - np.maximum(edges, low), 0, None) / PATCH_SIZE


def label(boxes: list[tuple[int, int, int, int, list]], grid: tuple[int, int, int]) -> np.ndarray:
    """(4, patches): shape, colour, state and whether the centre lies there.

    Boxes are (group of frames, shape, colour, state, [(left, top, width)]), the last of one or two frames.
    """
    _, rows, columns = grid
    out = np.zeros((4, *grid), np.int64)
    out[0], out[1] = len(SHAPES), len(COLOURS)
    out[2] = -100
    best = np.full(grid, 0.2)
    for group, shape, colour, state, places in boxes:
        cover = np.mean([np.outer(_overlap(y, w, rows), _overlap(x, w, columns)) for x, y, w in places], 0)
        covered = cover > best[group]
        best[group][covered] = cover[covered]
        out[0, group][covered], out[1, group][covered], out[2, group][covered] = shape, colour, state
        x, y, w = places[-1]
        out[
            3, group, min(int((y + w / 2) // PATCH_SIZE), rows - 1), min(int((x + w / 2) // PATCH_SIZE), columns - 1)
        ] = 1
    return by_patch(out)


def picture_label(shapes: list[findit.Shape], grid: tuple[int, int, int]) -> np.ndarray:
    """Labels of a picture, (4, patches)."""
    return label(
        [
            (0, SHAPES.index(s.kind), COLOURS.index(s.colour), 0, [(s.x - s.width / 2, s.y - s.width / 2, s.width)])
            for s in shapes
        ],
        grid,
    )


def clip_label(actors: list[watchit.Actor], grid: tuple[int, int, int]) -> np.ndarray:
    """Labels of a clip, (4, patches)."""
    boxes = []
    for actor in actors:
        for group in range(grid[0]):
            shown = [f for f in (2 * group, 2 * group + 1) if actor.opacity(f)]
            if not shown:
                continue
            places = [(*actor.at(f), actor.width) for f in shown]
            comes = actor.begins > 0 and actor.begins in shown
            state = (3 if len(shown) == 1 else 2) if comes else int(places[0] != places[-1])
            boxes.append((group, SHAPES.index(actor.kind), COLOURS.index(actor.colour), state, places))
    return label(boxes, grid)


def draw_picture(rng: np.random.Generator, height: int, width: int, crowded: bool, split: str = "train"):
    """A scene of a size: the picture, what is in it, and the same on the scale that questions are asked at."""
    if (height, width) == (findit.SIZE, findit.SIZE):
        image, shapes = findit.draw("crowded" if crowded else split, int(rng.integers(100_000, N_SEEDS)))
        return image, shapes, shapes
    if height == width and rng.random() < 0.5:
        image, shapes = findit.draw(split, int(rng.integers(100_000, N_SEEDS)))
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        by = width / findit.SIZE
        return image, [findit.Shape(s.kind, s.colour, s.x * by, s.y * by, s.width * by) for s in shapes], shapes
    image = findit.background(rng, height, width)
    boxes: list[tuple[int, int, int]] = []
    n_shapes = 9 if crowded else int(rng.integers(3, 7))
    for _ in range(40 * n_shapes):
        side = int(rng.integers(12, 18))
        box = int(rng.integers(1, width - side)), int(rng.integers(1, height - side)), side
        if len(boxes) < n_shapes and findit.is_free(box, boxes):
            boxes.append(box)
    shapes = findit.paint_shapes(image, rng, boxes)
    asked = [
        findit.Shape(s.kind, s.colour, s.x * findit.SIZE / width, s.y * findit.SIZE / height, s.width) for s in shapes
    ]
    return np.clip(image, 0, 255).astype(np.uint8), shapes, asked


def without_easy(rng: np.random.Generator, asked: list[tuple[str, str, str]]) -> list:
    """Questions of which a share of those that tiny-llava's language model answers at once is left out; one stays."""
    hard = [q for q in asked if q[2] in ("count", "position") or rng.random() < SHARE_EASY]
    return hard or asked[:1]


def picture_batch(rng: np.random.Generator, n: int, crowded: float = 0.0) -> Batch:
    """Scenes of one size, of which a share is crowded (questions are asked about the others)."""
    height, width = (findit.SIZE,) * 2 if rng.random() < 0.6 else SIZES[rng.integers(len(SIZES))]
    drawn = [draw_picture(rng, height, width, bool(rng.random() < crowded)) for _ in range(n)]
    return _pictures(drawn, [without_easy(rng, findit.ask(rng, asked, rounds=3)) for _, _, asked in drawn])


def _pictures(drawn: list, questions: list[list[tuple[str, str, str]]]) -> Batch:
    height, width = drawn[0][0].shape[:2]
    grid = 1, height // PATCH_SIZE, width // PATCH_SIZE
    labels = np.stack([picture_label(shapes, grid) for _, shapes, _ in drawn])
    images = np.stack([image for image, _, _ in drawn])[:, None]
    return Batch(patchify(images), torch.from_numpy(labels), grid, False, questions)


def other_sizes(n: int) -> list[Batch]:
    """N scenes of every other size, drawn from seeds that training does not use, one question of each kind."""
    batches = []
    for i, (height, width) in enumerate(SIZES):
        rng = np.random.default_rng((0, 8, i))
        drawn = [draw_picture(rng, height, width, crowded=False, split="validation") for _ in range(n)]
        batches.append(_pictures(drawn, [findit.ask(rng, asked) for _, _, asked in drawn]))
    return batches


def clip_batch(rng: np.random.Generator, n: int) -> Batch:
    """Clips of the training split."""
    return _clips([watchit.draw("train", int(i)) for i in rng.integers(100_000, N_SEEDS, n)], rng)


def _clips(drawn: list, rng: np.random.Generator, rounds: int = 3) -> Batch:
    side = watchit.SIZE // PATCH_SIZE
    grid = watchit.N_FRAMES // 2, side, side
    labels = np.stack([clip_label(actors, grid) for _, actors in drawn])
    questions = [watchit.ask(rng, actors, rounds) for _, actors in drawn]
    return Batch(patchify(np.stack([f for f, _ in drawn])), torch.from_numpy(labels), grid, True, questions)


def validation_batches(n: int, part: int = 50) -> list[Batch]:
    """The first n scenes and the first n clips of the validation splits, one question of each kind."""
    rng = np.random.default_rng((0, 7))
    batches = []
    for i in range(0, n, part):
        scenes = [findit.draw("validation", j) for j in range(i, min(i + part, n))]
        drawn = [(image, shapes, shapes) for image, shapes in scenes]
        batches.append(_pictures(drawn, [findit.ask(rng, shapes) for _, shapes in scenes]))
    for i in range(0, n, part):
        batches.append(_clips([watchit.draw("validation", j) for j in range(i, min(i + part, n))], rng, rounds=1))
    return batches


def _of_another(batch: Batch) -> Batch:
    return replace(batch, patches=batch.patches.roll(len(batch.patches) // 2, 0))


def _steps(batch: Batch) -> Tensor:
    """(B, T, rows * columns, 3, 2, values of a patch of a frame)."""
    frames, rows, columns = batch.grid
    return batch.patches.unflatten(1, (frames, rows * columns)).unflatten(3, (3, 2, PATCH_SIZE**2))


def _first_frame(batch: Batch) -> Batch:
    first = _steps(batch)[:, :1, :, :, :1].expand(-1, batch.grid[0], -1, -1, 2, -1)
    return replace(batch, patches=first.flatten(3).flatten(1, 2))


def _last_frame(batch: Batch) -> Batch:
    last = _steps(batch)[:, -1:, :, :, -1:].expand(-1, batch.grid[0], -1, -1, 2, -1)
    return replace(batch, patches=last.flatten(3).flatten(1, 2))


def _mixed(batch: Batch) -> Batch:
    frames = _steps(batch).movedim(4, 2).flatten(1, 2)
    order = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)
    mixed = torch.stack([clip[places] for clip, places in zip(frames, order, strict=True)])
    return replace(batch, patches=mixed.unflatten(1, (batch.grid[0], -1)).movedim(2, 4).flatten(3).flatten(1, 2))


# Pictures have one step of two equal frames: only the first floor changes them.
FLOORS = {"other": _of_another, "first": _first_frame, "last": _last_frame, "mixed": _mixed}


def question_floor(task: str, n: int) -> str:
    """Share of the questions about n validation pictures that the most frequent answer of the training split gets."""
    cls = {"findit": findit.FindIt, "watchit": watchit.WatchIt}[task]
    asked: dict[str, Counter] = {}
    for sample in cls("train").samples():
        asked.setdefault(sample.question, Counter())[sample.answer] += 1
    guess = {question: answers.most_common(1)[0][0] for question, answers in asked.items()}
    samples = cls("validation", n).samples()
    return f"{task} {np.mean([guess.get(s.question) == s.answer for s in samples]):.3f}"


def encode(text: str) -> list[int]:
    """Word ids; an unknown word is an error here."""
    return [WORD_IDS[w] for w in text.replace("?", " ?").split()]


def pack(questions: list[list[tuple[str, str, str]]]) -> dict[str, Tensor]:
    """All questions of a picture in one row, each behind the end of the picture; as `language.pack`."""
    rows = []
    for asked in questions:
        row: list[tuple[int, int, int, int]] = []
        for block, (question, answer, _) in enumerate(asked, 1):
            prompt, reply = [END, *encode(question), ASSISTANT], [*encode(answer), EOS]
            targets = [-100] * (len(prompt) - 1) + reply + [-100]
            # The last token answers nothing and is left out.
            row += [
                (t, i, block, target)
                for i, (t, target) in enumerate(zip((prompt + reply)[:-1], targets[:-1], strict=True))
            ]
        rows.append(row)
    length = max(map(len, rows))
    filled = torch.tensor([row + [(PAD, 0, 0, -100)] * (length - len(row)) for row in rows])
    return dict(zip(("ids", "offset", "block", "target"), filled.unbind(-1), strict=True))


def draw_kept(rng: np.random.Generator, x: Tensor, grid: tuple[int, int, int], drops: bool) -> Tensor:
    """Which tokens stay, (B, K) ascending; x is (B, N, D), the grid in tokens.

    A quarter of the steps, and all that do not drop yet, keep all. Else K is log-uniform and the subset is uniform, a
    smooth blob in time and space, or the top of a random direction in feature space: no method's own choice.
    """
    batch, n = x.shape[:2]
    if not drops or rng.random() < 0.25:
        return torch.arange(n).expand(batch, -1)
    n_keep = 0 if rng.random() < 0.04 else round(math.exp(rng.uniform(math.log(2), math.log(n))))
    kind = rng.integers(3)
    if kind == 0:
        score = torch.rand(batch, n)
    elif kind == 1:
        coarse = torch.rand(batch, 1, min(grid[0], 3), 4, 4)
        score = F.interpolate(coarse, size=grid, mode="trilinear", align_corners=True).flatten(1)
        score = score + 1e-4 * torch.rand_like(score)
    else:
        score = torch.einsum("bnd,bd->bn", x - x.mean(1, keepdim=True), torch.randn(batch, x.shape[-1]))
    return score.topk(n_keep, 1).indices.sort(1).values


class Trainer(nn.Module):
    """The whole model with linear heads on the tower's patches, and on visual tokens within the language model.

    Nothing in the tower can tell where a patch lies, and M-RoPE only says so relative to other tokens. The second head
    asks every visual token for its step of time, its row and its column.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.model
        self.heads = nn.Linear(TOWER_WIDTH, sum(HEADS))
        self.place = nn.Linear(model.config.text_config.hidden_size, sum(PLACES))
        self.prefix = torch.tensor([BOS, USER, START])
        embed = self.model.visual.patch_embed
        # A convolution whose stride is its size is a linear map, several times as fast as one on a CPU.
        embed.forward = lambda x: F.linear(x, embed.proj.weight.flatten(1))

    def see(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of every patch, (B, P, heads), and rows for the language model, (B, N, D)."""
        n, grids = len(batch.patches), torch.tensor([batch.grid] * len(batch.patches))
        out = self.model.visual(batch.patches.flatten(0, 1), grid_thw=grids)
        states = out.last_hidden_state.unflatten(0, (-1, MERGE**2))[self._order(grids)].flatten(0, 1)
        shown = self.heads(F.rms_norm(states, states.shape[-1:]))
        return shown.unflatten(0, (n, -1)), out.pooler_output.unflatten(0, (n, -1))

    def _order(self, grids: Tensor) -> Tensor:
        order = family_of(self.model).token_order(grids)
        return torch.arange(len(grids)) if order is None else order

    def answers(self, visual: Tensor, batch: Batch, kept: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits at the answered positions from the rows at `kept` (B, K), and the loss of their places."""
        words, n = self.model.language_model.embed_tokens, len(kept)
        visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        embeds = torch.cat([words(self.prefix.expand(n, -1)), visual, words(text["ids"])], 1)
        places, start = positions(self.model, batch.grid, batch.is_video)
        before = torch.arange(3).expand(3, n, -1)
        after = (text["offset"] + start).expand(3, -1, -1)
        position_ids = torch.cat([before, places[:, kept], after], 2)
        shared = text["block"].new_full((n, 3 + kept.shape[1]), -1)
        block = torch.cat([shared, text["block"]], 1)
        sees = (block[:, None] == block[:, :, None]) | (block[:, None] == -1)
        mask = (sees & torch.ones(sees.shape[1:], dtype=torch.bool).tril())[:, None]
        out = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        seen = self.place(out.hidden_states[PLACE_LAYER][:, 3 : 3 + kept.shape[1]])
        place = place_loss(seen, (places - 3)[:, kept])
        states = out.last_hidden_state[:, 3 + kept.shape[1] :]
        return states[text["target"] != -100] @ words.weight.T, place


def place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Cross entropies of time, row and column; logits (B, K, 20), places (3, B, K)."""
    parts = zip(logits.split(PLACES, -1), places, strict=True)
    if not places.numel():
        return logits.sum()
    return torch.stack([F.cross_entropy(some.flatten(0, 1), place.flatten()) for some, place in parts]).sum()


def tower_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies of shape, colour and state, and of centres against the rest; labels (B, 4, P)."""
    shape, colour, state, centre = logits.split(HEADS, -1)
    background = torch.ones(HEADS[0]).index_fill(0, torch.tensor(HEADS[0] - 1), 0.15)
    rare = torch.tensor([0.5, 2.0, 2.0, 2.0])
    loss = F.cross_entropy(shape.flatten(0, 1), labels[:, 0].flatten(), background)
    loss = loss + F.cross_entropy(colour.flatten(0, 1), labels[:, 1].flatten())
    loss = loss + F.cross_entropy(state.flatten(0, 1), labels[:, 2].flatten(), rare, ignore_index=-100)
    return loss + F.binary_cross_entropy_with_logits(centre[..., 0], labels[:, 3].float(), pos_weight=torch.tensor(8.0))


@torch.no_grad()
def tower_accuracy(trainer: Trainer, batches: list[Batch]) -> str:
    """Shape, colour and state at the centres of shapes, of pictures and of clips."""
    said = []
    for is_video in (False, True):
        right = []
        for batch in (b for b in batches if b.is_video == is_video):
            shape, colour, state, _ = trainer.see(batch)[0].split(HEADS, -1)
            guess = torch.stack([shape[..., :-1].argmax(-1), colour[..., :-1].argmax(-1), state.argmax(-1)])
            centre = batch.labels[:, 3] > 0
            same = guess == batch.labels[:, :3].transpose(0, 1)
            shown = batch.labels[:, 2] != -100
            right.append(same[:, centre & shown].float())
        said.append(" ".join(f"{v:.3f}" for v in torch.cat(right, 1).mean(1).tolist()))
    return f"pictures {said[0]} clips {said[1]}"


@torch.no_grad()
def answer_accuracy(trainer: Trainer, batches: list[Batch], share: float = 1.0) -> str:
    """Whole answers right under teacher forcing, by task and kind, from all or a random share of the tokens.

    Teacher forcing finds the same answers right as greedy decoding does.
    """
    right: dict[tuple[bool, str], list[bool]] = {}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        visual, text = trainer.see(batch)[1], pack(batch.questions)
        n = visual.shape[1]
        kept = torch.rand(visual.shape[:2], generator=generator).topk(round(share * n)).indices.sort().values
        found: dict[str, list[bool]] = {}
        tally(found, trainer.answers(visual, batch, kept, text)[0], text, batch.questions)
        for kind, answers in found.items():
            right.setdefault((batch.is_video, kind), []).extend(answers)
    said = []
    for name, is_video, kinds in (("findit", False, findit.KINDS), ("watchit", True, watchit.KINDS)):
        by_kind = [right[is_video, k] for k in kinds if (is_video, k) in right]
        if not by_kind:
            continue
        said.append(
            f"{name} {np.mean(np.concatenate(by_kind)):.3f} (" + " ".join(f"{np.mean(r):.2f}" for r in by_kind) + ")"
        )
    return " ".join(said)
