"""Processors, and what they make of a prompt about pictures or about clips; no torchvision is needed for either.

transformers makes video processors of torchvision alone, and refuses the whole processor of a Qwen without it.
`load_processor` then loads the same processor without its video part, and `inputs_of` cuts clips into patches with the
image processor: two frames in a row are one step of time.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.utils import is_torchvision_available

from tokprune.core.errors import RunError
from tokprune.prune.videos import Clip

from .families import FAMILIES

Visual = Image.Image | Clip


def load_processor(path: str, **options: Any) -> Any:
    """The processor of a folder or a hub id, without its video part where torchvision is missing.

    Code that a folder or a hub id brings along is never run.

    Args:
        path: the folder or the hub id.
        **options: of `from_pretrained`, such as `revision`.
    """
    if not is_torchvision_available():
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        if config.model_type in FAMILIES.names() and FAMILIES.load(config.model_type).picture_processor:
            whole = without_videos(config.model_type)
            return whole.from_pretrained(path, trust_remote_code=False, **options)
    return transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False, **options)


@functools.cache
def without_videos(model_type: str) -> type[transformers.ProcessorMixin]:
    """The processor class of a family for pictures and text alone."""
    family = FAMILIES.load(model_type)
    whole = getattr(transformers, family.picture_processor)

    class WithoutVideos(whole):
        """What parts there are is read off the arguments."""

        patches_clips = family.patches_clips

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **options):
            super().__init__(image_processor, tokenizer, chat_template=chat_template, **options)

        @staticmethod
        def validate_init_kwargs(processor_config, valid_kwargs):
            """Saved options are those of the whole class, whose signature has them."""
            own = inspect.signature(whole.__init__).parameters.keys() - {"self", "video_processor", "kwargs"}
            return whole.validate_init_kwargs(processor_config, own)

    WithoutVideos.__name__ = whole.__name__  # what is saved is called by the name that others can load
    return WithoutVideos


def inputs_of(processor: Any, text: Sequence[str], visuals: Sequence[Sequence[Visual]]) -> transformers.BatchFeature:
    """Left-padded inputs of a batch: prompts with placeholders, and the pictures and clips of each in their order.

    Raises:
        RunError: a clip, and a processor that has no video part here.
    """
    clips = [v for row in visuals for v in row if isinstance(v, Clip)]
    pictures = [[v for v in row if not isinstance(v, Clip)] for row in visuals]
    if clips and getattr(processor, "video_processor", None) is None:
        return _by_hand(processor, text, [v for row in pictures for v in row], clips)
    given: dict[str, Any] = {"images": [row for row in pictures if row]} if any(pictures) else {}
    if clips:  # frames were chosen when they were read
        given |= {"videos": [np.stack([np.asarray(frame) for frame in clip.frames]) for clip in clips]}
        given |= {"video_metadata": [_metadata(clip) for clip in clips], "do_sample_frames": False}
    return processor(text=list(text), padding=True, return_tensors="pt", **given)


def _metadata(clip: Clip) -> dict[str, Any]:
    n = len(clip.frames)
    return {"fps": clip.fps, "total_num_frames": n, "frames_indices": list(range(n))}


def _by_hand(
    processor: Any, text: Sequence[str], pictures: Sequence[Image.Image], clips: Sequence[Clip]
) -> transformers.BatchFeature:
    """What a Qwen's own processor makes of pictures and clips, with its image processor alone."""
    if not hasattr(processor, "video_token"):
        raise RunError(
            f"{type(processor).__name__} takes no videos; use pictures, or a model that takes videos, such as a Qwen-VL"
        )
    if not getattr(processor, "patches_clips", False):
        raise RunError(
            f"{type(processor).__name__} makes no inputs of videos here; install torchvision, which its video part "
            "needs, or use pictures"
        )
    made = dict(processor.image_processor(list(pictures), return_tensors="pt")) if pictures else {}
    made |= video_inputs(processor, clips)
    folds = processor.image_processor.merge_size**2
    counts = {
        processor.image_token: (made["image_grid_thw"].prod(-1) // folds).tolist() if pictures else [],
        processor.video_token: (made["video_grid_thw"].prod(-1) // folds).tolist(),
    }
    for token, lengths in counts.items():
        if (n := sum(prompt.count(token) for prompt in text)) != len(lengths):
            raise RunError(f"the prompts have {n} {token} for {len(lengths)} visuals; write one for each")
    left = {token: iter(lengths) for token, lengths in counts.items()}
    either = re.compile("|".join(map(re.escape, counts)))
    filled = [either.sub(lambda found: found[0] * next(left[found[0]]), prompt) for prompt in text]
    ids = processor.tokenizer(filled, padding=True, return_tensors="pt")
    types = torch.tensor(processor.create_mm_token_type_ids(ids["input_ids"].tolist()))
    return transformers.BatchFeature({**ids, "mm_token_type_ids": types, **made})


def video_inputs(processor: Any, clips: Sequence[Clip]) -> dict[str, Tensor]:
    """What a Qwen is given of clips, as its own video processor names it.

    Returns `pixel_values_videos` (patches of all clips, values), `video_grid_thw` (clips, 3) in patches, and
    `second_per_grid_ts` (clips,), the seconds that a step of time takes. Of an odd number of frames, the last counts
    twice.
    """
    images = processor.image_processor
    per_step = images.temporal_patch_size
    patches, grids = [], []
    for clip in clips:
        frames = [*clip.frames, *clip.frames[-1:] * (-len(clip.frames) % per_step)]
        made = images(frames, return_tensors="np")
        _, rows, columns = made["image_grid_thw"][0]
        # A picture fills all places of a step; every frame keeps the one place that it has in its step.
        values = made["pixel_values"].reshape(-1, per_step, rows * columns, 3, per_step, images.patch_size**2)
        steps = np.stack([values[:, i, :, :, i] for i in range(per_step)], 3)
        patches.append(steps.reshape(len(steps) * rows * columns, -1))
        grids.append([len(steps), rows, columns])
    return {
        "pixel_values_videos": torch.from_numpy(np.concatenate(patches)),
        "video_grid_thw": torch.tensor(grids),
        "second_per_grid_ts": torch.tensor([per_step / clip.fps for clip in clips]),
    }
