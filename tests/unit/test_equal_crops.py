"""Crops that lie alike are selected from at once, and keep what they keep one by one; [CLS] rows copy no keys."""

from __future__ import annotations

import pytest
import torch
from specs import LAYOUTS, SPECS, build, tokens_for
from torch.utils._python_dispatch import TorchDispatchMode

from tokprune.core import attention
from tokprune.core.layout import frames_layout
from tokprune.methods import crops

BY_CROP = [
    s for s in SPECS if s.partition(":")[0] in ("hiprune", "prumerge", "prumerge_plus", "tokencorr", "visionzip")
]
BY_CROP += [s for s in SPECS if s.endswith("split=even")] + ["vispruner"]


@pytest.mark.parametrize("spec", BY_CROP)
@pytest.mark.parametrize("layout", ["three frames", "nine frames", "padded"])
def test_crops_at_once_keep_what_crops_one_by_one_keep(spec, layout, monkeypatch):
    tokens = tokens_for(spec, layout=LAYOUTS[layout])
    n_keep = tokens.n_visual // 2
    together = build(spec).select(tokens, n_keep)
    monkeypatch.setattr(crops, "LARGEST", 0)
    apart = build(spec).select(tokens, n_keep)
    assert torch.equal(together.keep, apart.keep)
    torch.testing.assert_close(together.features, apart.features)


def test_equal_crops_are_those_whose_tokens_lie_alike():
    """A thumbnail of 6 x 6, and a mosaic of 9 rows: 4 in its upper crops and 5 in the lower ones."""
    assert frames_layout(7, 3, 4).equal_crops == (tuple(range(7)),)
    assert LAYOUTS["thumbnail and 2x2"].equal_crops == (tuple(range(5)),)
    sizes = LAYOUTS["padded"].crop_sizes
    assert [len({sizes[crop] for crop in alike}) for alike in LAYOUTS["padded"].equal_crops] == [1, 1, 1]
    assert LAYOUTS["padded"].equal_crops[0] == (0,)


def test_a_crop_takes_the_class_state_and_the_text_of_its_own_picture():
    tokens = tokens_for("visionzip", layout=frames_layout(3, 2, 2))
    at, part = tokens.crops_as_images((0, 2))
    assert at.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    g = len(tokens.features)
    assert torch.equal(part.features, torch.cat([tokens.features[:, :4], tokens.features[:, 8:]]))
    for signal, values in tokens.signals.items():
        if signal.kind.name == "CLS_STATE":
            assert torch.equal(part.signals[signal][:, 0], torch.cat([values[:, 0], values[:, 2]]))
        elif signal.kind.is_per_token:
            assert torch.equal(part.signals[signal][g:], values[:, :, 8:])


class Copies(TorchDispatchMode):
    """The largest tensor that was copied."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("form", ["softmax", "logits"])
def test_class_rows_of_a_batch_copy_no_keys_and_equal_those_of_single_pictures(form):
    q, k = (torch.randn(5, 50, 4 * 8).unflatten(-1, (4, 8)).transpose(1, 2) for _ in "qk")
    with Copies() as copies:
        rows = attention.cls_row(q, k, 0.3, form)
    assert copies.largest < k[0].numel()
    assert torch.equal(rows, torch.cat([attention.cls_row(q[i, None], k[i, None], 0.3, form) for i in range(5)]))
