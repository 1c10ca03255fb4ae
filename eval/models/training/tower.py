"""How the vision tower learns: labels for patches and for [CLS], and the losses on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...tasks import findit
from ...tasks.easyvqa import EasyVQA
from .recipe import EASYVQA_COLOURS, EASYVQA_SHAPES, GRID, PATCH_SIZE

COLOURS, SHAPES = list(findit.COLOURS), list(findit.SHAPES)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
N_DENSE = len(SHAPES) + 1 + len(COLOURS) + 1 + 1  # shape or none, colour or none, centre


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
    """The tower with linear heads on [CLS] (last layer) and on every patch (the layer LLaVA reads).

    The head for places asks every patch for its own row and column: without it the tower forgets where a patch
    lies, and no language model can tell once tokens are dropped and positions made contiguous.
    """

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        n_whole = len(SHAPES) * len(COLOURS) + len(SHAPES) + len(COLOURS)
        self.whole, self.easy = nn.Linear(128, n_whole), nn.Linear(128, len(EASYVQA_SHAPES) + len(EASYVQA_COLOURS))
        self.dense = nn.Linear(128, N_DENSE)
        self.place = nn.Linear(128, 2 * GRID)

    def forward(self, x: Tensor, n_scenes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits for the whole scene, for the easy-VQA object, for what patches show, and for where they lie."""
        out = self.tower(x, output_hidden_states=True)
        cls, patches = out.pooler_output, out.hidden_states[-2][:, 1:]
        shown = self.dense(patches[:n_scenes])
        return self.whole(cls[:n_scenes]), self.easy(cls[n_scenes:]), shown, self.place(patches)


def place_loss(logits: Tensor) -> Tensor:
    """Cross entropy of every patch's row and column; logits (B, N, 2 * GRID)."""
    rows, columns = torch.arange(GRID).repeat_interleave(GRID), torch.arange(GRID).repeat(GRID)
    per_patch = logits.unflatten(-1, (2, GRID)).permute(0, 3, 1, 2)  # (B, GRID, N, 2)
    return F.cross_entropy(per_patch, torch.stack([rows, columns], -1).expand(len(logits), -1, -1))


def tower_loss(logits: tuple[Tensor, ...], whole: Tensor, patches: Tensor, easy: Tensor) -> Tensor:
    """Binary losses on [CLS], cross entropies on patches, on their places and on easy-VQA's object."""
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
    return loss + 0.5 * dense + 0.25 * sum(named) + 0.3 * place_loss(logits[3]) + 0 * logits[1].sum()


@torch.no_grad()
def tower_accuracy(trainer: TowerTrainer, scenes: Scenes) -> str:
    """Shape and colour at the centre patch of validation scenes, and the mean loss of places."""
    right, places = torch.zeros(3), []
    for i in range(0, len(scenes.images), 50):
        _, _, out, place = trainer(pixels(scenes.images[i : i + 50]), len(scenes.images[i : i + 50]))
        places.append(place_loss(place).item())
        truth = torch.stack([scene_labels(s)[1] for s in scenes.shapes[i : i + 50]])
        centre = truth[:, 2] > 0
        n_s = len(SHAPES) + 1
        shape, colour = out[..., : n_s - 1].argmax(-1), out[..., n_s : n_s + len(COLOURS)].argmax(-1)
        right += torch.tensor(
            [(shape == truth[:, 0])[centre].sum(), (colour == truth[:, 1])[centre].sum(), centre.sum()]
        )
    return f"shape {right[0] / right[2]:.3f} colour {right[1] / right[2]:.3f} places {np.mean(places):.3f}"
