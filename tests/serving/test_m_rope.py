"""Positions of what stays of pictures, chunk by chunk: those that transformers gives the same tokens unpruned."""

from __future__ import annotations

import pytest
import torch
from tokprune.eval.models import path_of
from tokprune.integrations.vllm.m_rope import CHANNELS, placed, text_positions, with_places
from tokprune.integrations.vllm.processing import check_places
from transformers import AutoConfig, AutoModelForImageTextToText

from tokprune.core.errors import UnsupportedModelError

TEXT, START, END = 20, 4, 5
PAD = AutoConfig.from_pretrained(path_of("tiny-qwen")).image_token_id
GRIDS = ((3, 6), (7, 2), (4, 4))  # rows and columns of tokens
KEPT = ([0, 7, 16, 17], [1, 5, 12], [3])
SPLIT = [TEXT, TEXT, START, 0, END, START, 1, END, TEXT, START, 2, END, TEXT]  # a number below 3 is a picture
GLUED = [0, 1, TEXT, 2, TEXT]


def transformers_positions(prompt):
    """(3, N) of the whole prompt, and what is added to a column behind it."""
    model = AutoModelForImageTextToText.from_pretrained(path_of("tiny-qwen"))
    grids = torch.tensor([[1, 2 * height, 2 * width] for height, width in GRIDS])
    ids = torch.tensor([spread(prompt, [range(h * w) for h, w in GRIDS])[0]])
    types = (ids == PAD).int()
    found, delta = model.model.get_rope_index(ids, types, image_grid_thw=grids)
    return found[:, 0], int(delta)


def positions_by_hand(prompt):
    """The same, also of pictures without text between."""
    found, base = [], 0
    for item in prompt:
        height, width = GRIDS[item] if item < len(GRIDS) else (1, 1)
        found += [(base, base + row, base + column) for row in range(height) for column in range(width)]
        base += max(height, width)
    return torch.tensor(found).T, base - len(found)


def spread(prompt, kept):
    """Ids with a placeholder for every row that stays; (first column, columns, rows, columns) of every picture."""
    ids, pictures = [], []
    for item in prompt:
        if item < len(GRIDS):
            pictures.append((len(ids), len(kept[item]), *GRIDS[item]))
            ids += [PAD] * len(kept[item])
        else:
            ids.append(item)
    return ids, pictures


def columns_that_stay(prompt):
    """Of the whole prompt."""
    found, at = [], 0
    for item in prompt:
        size = GRIDS[item][0] * GRIDS[item][1] if item < len(GRIDS) else 1
        found += [at + place for place in (KEPT[item] if item < len(GRIDS) else [0])]
        at += size
    return found


@pytest.mark.parametrize("n_chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("prompt", "reference"), [(SPLIT, transformers_positions), (SPLIT, positions_by_hand), (GLUED, positions_by_hand)]
)
def test_what_stays_has_the_positions_that_it_had(prompt, reference, n_chunk):
    whole, delta = reference(prompt)
    ids, pictures = spread(prompt, KEPT)
    is_picture = torch.tensor(ids) == PAD
    rows = [
        with_places(torch.full((len(kept), 2), float(i)), torch.tensor(kept), GRIDS[i][1])
        for i, kept in enumerate(KEPT)
    ]
    flat = torch.cat(rows).bfloat16()
    found, behind = text_positions(len(ids), pictures)
    is_text, stay = ~is_picture, whole[:, columns_that_stay(prompt)]
    assert torch.equal(found[:, is_text], stay[:, is_text])  # known before a picture is encoded
    assert behind == delta + whole.shape[1] - len(ids)
    for begin in [*range(0, len(ids), n_chunk), 0]:  # once more from the start, as of a request that was set aside
        end = begin + n_chunk
        edges = [(max(begin, first), min(end, first + n)) for first, n, *_ in pictures]
        parts = [flat[int(is_picture[:a].sum()) : int(is_picture[:b].sum())] for a, b in edges if a < b]
        bare, found, behind = placed(found, is_picture, parts, begin)
        assert all(torch.equal(own, part[:, :-CHANNELS]) for own, part in zip(bare, parts, strict=True))
        assert behind == delta + whole.shape[1] - len(ids)
        assert torch.equal(found[:, begin:end], stay[:, begin:end])


def test_places_of_a_large_picture_pass_through_half_precision():
    index = torch.tensor([0, 299, 300 * 777 + 255, 300 * 999 + 298])
    rows = with_places(torch.zeros(4, 1, dtype=torch.bfloat16), index, 300)
    found, _ = text_positions(6, [(1, 4, 1000, 300)])
    _, found, behind = placed(found, torch.tensor([0, 1, 1, 1, 1, 0]).bool(), [rows], 0)
    assert (found[1, 1:5] - 1).tolist() == [0, 0, 777, 999]
    assert (found[2, 1:5] - 1).tolist() == [0, 299, 255, 298]
    assert behind == 1001 - 5


def test_a_prompt_of_placeholders_without_a_picture_does_not_end_the_engine():
    found, _ = text_positions(3, [])
    _, same, behind = placed(found, torch.ones(3).bool(), [], 0)
    assert torch.equal(same, found)
    assert behind == 0


def test_prompts_whose_pictures_cannot_be_told_apart_are_refused():
    check_places([TEXT, START, PAD, PAD, END], [2], PAD)
    check_places([TEXT], [], PAD)
    with pytest.raises(UnsupportedModelError, match="more image tokens than pictures"):
        check_places([TEXT, PAD, START, PAD, PAD, END], [2], PAD)
    with pytest.raises(UnsupportedModelError, match=r"<\|vision_end\|>"):
        check_places([TEXT, START, PAD, PAD], [2], PAD)
