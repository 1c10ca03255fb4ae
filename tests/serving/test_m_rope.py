"""Positions of what stays of pictures, chunk by chunk: those that transformers gives the same tokens unpruned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tokprune.eval.models import path_of
from tokprune.integrations.vllm.m_rope import CHANNELS, placed, text_positions, with_places
from tokprune.integrations.vllm.processing import check_places
from transformers import AutoConfig, AutoModelForImageTextToText

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import frames_layout, grid_layout

TEXT, START, END = 20, 4, 5
CONFIG = AutoConfig.from_pretrained(path_of("tiny-qwen"))
PAD, FRAMES = CONFIG.image_token_id, CONFIG.video_token_id
SIZES = ((1, 3, 6), (1, 7, 2), (1, 4, 4), (5, 2, 3))  # steps, rows and columns of tokens
SECONDS = 0.5  # of a step of the video, which is the last one
KEPT = ([0, 7, 16, 17], [1, 5, 12], [3], [4, 11, 13, 26, 29])
SPLIT = [TEXT, TEXT, START, 0, END, START, 1, END, TEXT, START, 2, END, TEXT]  # a number below 4 is a picture or video
GLUED = [0, 1, TEXT, 2, TEXT]
CLIP = [TEXT, START, 3, END, TEXT, START, 2, END, TEXT]
CLIPS = [TEXT, 3, 3, 0, TEXT]


def transformers_positions(prompt):
    """(3, N) of the whole prompt, and what is added to a column behind it."""
    model = AutoModelForImageTextToText.from_pretrained(path_of("tiny-qwen"))
    shown = [SIZES[item] for item in prompt if item < len(SIZES)]
    grids = torch.tensor([[steps, 2 * height, 2 * width] for steps, height, width in shown])
    is_clip = grids[:, 0] > 1
    ids = torch.tensor([spread(prompt, [range(math.prod(size)) for size in SIZES])[0]])
    types = (ids == PAD).int() + 2 * (ids == FRAMES).int()
    seconds = torch.full((int(is_clip.sum()),), SECONDS)
    found, delta = model.model.get_rope_index(
        ids, types, image_grid_thw=grids[~is_clip], video_grid_thw=grids[is_clip], second_per_grid_ts=seconds
    )
    return found[:, 0], int(delta)


def positions_by_hand(prompt):
    """The same, also of pictures without text between."""
    found, base = [], 0
    for item in prompt:
        steps, height, width = SIZES[item] if item < len(SIZES) else (1, 1, 1)
        places = itertools.product(range(steps), range(height), range(width))
        found += [(base + int(step * SECONDS), base + row, base + column) for step, row, column in places]
        base = 1 + max(itertools.chain(*found))
    return torch.tensor(found).T, base - len(found)


def spread(prompt, kept):
    """Ids with a placeholder for every row that stays; (first column, columns, positions) of every picture."""
    ids, pictures = [], []
    for item in prompt:
        if item < len(SIZES):
            steps, height, width = SIZES[item]
            pictures.append((len(ids), len(kept[item]), max(1 + int((steps - 1) * SECONDS), height, width)))
            ids += [PAD if steps == 1 else FRAMES] * len(kept[item])
        else:
            ids.append(item)
    return ids, pictures


def columns_that_stay(prompt):
    """Of the whole prompt."""
    found, at = [], 0
    for item in prompt:
        size = math.prod(SIZES[item]) if item < len(SIZES) else 1
        found += [at + place for place in (KEPT[item] if item < len(SIZES) else [0])]
        at += size
    return found


def layout_of(item):
    steps, height, width = SIZES[item]
    return grid_layout(height, width) if steps == 1 else frames_layout(steps, height, width)


@pytest.mark.parametrize("n_chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("prompt", "reference"),
    [(prompt, transformers_positions) for prompt in (SPLIT, CLIP)]
    + [(prompt, positions_by_hand) for prompt in (SPLIT, GLUED, CLIP, CLIPS)],
)
def test_what_stays_has_the_positions_that_it_had(prompt, reference, n_chunk):
    whole, delta = reference(prompt)
    ids, pictures = spread(prompt, KEPT)
    is_picture = (torch.tensor(ids) == PAD) | (torch.tensor(ids) == FRAMES)
    rows = [
        with_places(torch.full((len(KEPT[item]), 2), float(item)), torch.tensor(KEPT[item]), layout_of(item), SECONDS)
        for item in prompt
        if item < len(SIZES)
    ]
    flat = torch.cat(rows).bfloat16()
    found, behind = text_positions(len(ids), pictures)
    is_text, stay = ~is_picture, whole[:, columns_that_stay(prompt)]
    assert torch.equal(found[:, is_text], stay[:, is_text])  # known before a picture is encoded
    assert behind == delta + whole.shape[1] - len(ids)
    for begin in [*range(0, len(ids), n_chunk)] * 2:  # twice, as of a request that was set aside
        end = begin + n_chunk
        edges = [(max(begin, first), min(end, first + n)) for first, n, *_ in pictures]
        parts = [flat[int(is_picture[:a].sum()) : int(is_picture[:b].sum())] for a, b in edges if a < b]
        bare, found, behind = placed(found, is_picture, parts, begin)
        assert all(torch.equal(own, part[:, :-CHANNELS]) for own, part in zip(bare, parts, strict=True))
        assert behind == delta + whole.shape[1] - len(ids)
        assert torch.equal(found[:, begin:end], stay[:, begin:end])


def test_places_of_a_large_picture_pass_through_half_precision():
    index = torch.tensor([0, 299, 300 * 777 + 255, 300 * 999 + 298])
    rows = with_places(torch.zeros(4, 1, dtype=torch.bfloat16), index, grid_layout(1000, 300))
    found, _ = text_positions(6, [(1, 4, 1000)])
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
    with pytest.raises(UnsupportedModelError, match="more image tokens than"):
        check_places([TEXT, PAD, START, PAD, PAD, END], [2], PAD)
    with pytest.raises(UnsupportedModelError, match=r"<\|vision_end\|>"):
        check_places([TEXT, START, PAD, PAD], [2], PAD)
