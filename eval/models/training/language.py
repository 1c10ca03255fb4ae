"""How the language model learns: packed questions, dropped tokens, and the accuracy of whole answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...tasks import findit
from .recipe import ASSISTANT, BOS, EOS, GRID, N_VISUAL, PAD, USER, WORD_IDS


def encode(text: str) -> list[int]:
    """Word ids; an unknown word is an error here."""
    return [WORD_IDS[w] for w in text.replace("?", " ?").split()]


def turn(question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of what is asked, up to where the answer begins, and of the answer with its stop token."""
    return [*encode(question), ASSISTANT], [*encode(answer), EOS]


def pack(
    questions: list[list[tuple[str, str, str]]],
    turn: Callable[[str, str], tuple[list[int], list[int]]] = turn,
    pad: int = PAD,
) -> dict[str, Tensor]:
    """All questions of a picture in one row; each sees the picture and itself only.

    Args:
        questions: of every picture, (question, answer, kind).
        turn: the ids of a question and of its answer.
        pad: id of the padding.

    Returns `ids`, `offset` (place within its question), `block` (question, from 1; 0 is padding) and
    `target` (the next token where it is answered for, -100 elsewhere), each (B, L).
    """
    rows = []
    for asked in questions:
        row: list[tuple[int, int, int, int]] = []
        for block, (question, answer, _) in enumerate(asked, 1):
            prompt, reply = turn(question, answer)
            targets = [-100] * (len(prompt) - 1) + reply + [-100]
            row += [(t, i, block, target) for i, (t, target) in enumerate(zip(prompt + reply, targets, strict=True))]
        rows.append(row)
    length = max(map(len, rows))
    filled = torch.tensor([row + [(pad, 0, 0, -100)] * (length - len(row)) for row in rows])
    return dict(zip(("ids", "offset", "block", "target"), filled.unbind(-1), strict=True))


def without_easy(rng: np.random.Generator, asked: list[tuple[str, str, str]], share: float) -> list:
    """Questions of which a share of those about colours and shapes is left out; at least one stays."""
    hard = [q for q in asked if q[2] not in ("colour", "shape") or rng.random() >= share]
    return hard or asked[:1]


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


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Weights of deviation 1 / sqrt(fan-in), embeddings of 0.15.

    The 0.02 of transformers suits widths of thousands: at 160 attention stays uniform for long, and learning to
    look at the picture takes several times as many pictures.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.15)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


class LanguageTrainer(nn.Module):
    """Projector and language model on features of the frozen tower, packed questions."""

    def __init__(self, model: nn.Module, prefix: Sequence[int] = (BOS, USER)):
        super().__init__()
        self.projector, self.language_model = model.model.multi_modal_projector, model.model.language_model
        self.prefix = torch.tensor(prefix)  # what stands before the picture

    def forward(self, x: Tensor, kept: Tensor, contiguous: bool, text: dict[str, Tensor]) -> Tensor:
        """Logits at the answered positions, (number of answered tokens, vocabulary)."""
        return self.answers(self.projector(x), kept, torch.ones_like(kept, dtype=torch.bool), contiguous, text)

    def answers(self, visual: Tensor, kept: Tensor, valid: Tensor, contiguous: bool, text: dict[str, Tensor]) -> Tensor:
        """The same from projected rows (B, N, D), of which those at `kept` (B, K) stay where `valid`."""
        words, n_all = self.language_model.embed_tokens, visual.shape[1]
        (batch, n_keep), n_before = kept.shape, len(self.prefix)
        visual = visual.gather(1, kept[..., None].expand(-1, -1, words.embedding_dim))
        embeds = torch.cat([words(self.prefix.expand(batch, -1)), visual, words(text["ids"])], 1)
        places = (valid.cumsum(1) - 1).clamp(min=0) if contiguous else kept
        text_start = n_before + (valid.sum(1, keepdim=True) if contiguous else n_all)
        first = torch.arange(n_before).expand(batch, -1)
        positions = torch.cat([first, places + n_before, text["offset"] + text_start], 1)
        # -1: the prefix that all questions share; -2: padding
        prefix = torch.cat([valid.new_ones(batch, n_before), valid], 1).long() - 2
        block = torch.cat([prefix, text["block"]], 1)
        sees = (block[:, None] == block[:, :, None]) | (block[:, None] == -1)
        mask = (sees & torch.ones(sees.shape[1:], dtype=torch.bool).tril())[:, None]
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[:, n_before + n_keep :]
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
            tally(right, trainer(part, kept, n_keep < N_VISUAL, text), text, questions[i : i + 50])
    mean = np.mean([np.mean(right[k]) for k in findit.KINDS])
    return f"findit {mean:.3f} " + " ".join(f"{k} {np.mean(v):.3f}" for k, v in right.items())


def tally(right: dict[str, list[bool]], logits: Tensor, text: dict[str, Tensor], questions: list[list]) -> None:
    """Note by kind whether each whole answer, the stop token included, is right."""
    hit = logits.argmax(-1) == text["target"][text["target"] != -100]
    rows, cols = (text["target"] != -100).nonzero().T
    for row, asked in enumerate(questions):
        blocks = text["block"][row, cols[rows == row]]
        for b, (_, _, kind) in enumerate(asked, 1):
            right.setdefault(kind, []).append(bool(hit[rows == row][blocks == b].all()))
