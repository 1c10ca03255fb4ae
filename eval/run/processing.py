"""Processors, and what they make of a prompt about pictures or about clips; no torchvision is needed for either.

transformers makes video processors of torchvision alone, and refuses the whole processor of a Qwen without it.
`load_processor` then loads the same processor without its video part, and `inputs_of` cuts clips into patches with the
image processor: two frames in a row are one step of time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.utils import is_torchvision_available

from tokprune.core.errors import RunError

from ..tasks.clip import Clip

QWEN = ("qwen2_vl", "qwen2_5_vl")


def load_processor(path: str) -> Any:
    """The processor of a folder or a hub id, without its video part where torchvision is missing.

    Code that a folder or a hub id brings along is never run.
    """
    from transformers import AutoConfig

    if not is_torchvision_available():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type in QWEN:
            return without_videos(config.model_type).from_pretrained(path)
    return AutoProcessor.from_pretrained(path, trust_remote_code=False)


@functools.cache
def without_videos(model_type: str) -> type[ProcessorMixin]:
    """Qwen's processor class for a model_type with pictures and text alone."""
    import transformers

    names = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
    whole = getattr(transformers, names[model_type])

    class WithoutVideos(whole):
        """What parts there are is read off the arguments."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **options):
            super().__init__(image_processor, tokenizer, chat_template=chat_template, **options)

    WithoutVideos.__name__ = whole.__name__  # what is saved is called by the name that others can load
    return WithoutVideos


def inputs_of(processor: Any, text: Sequence[str], visuals: Sequence[Image.Image | Clip]) -> BatchFeature:
    """Left-padded inputs of a batch: prompts with one placeholder each, and the picture or the clip of each.

    Raises:
        RunError: a clip, and a processor without a video part that is not of Qwen.
    """
    clips = [v for v in visuals if isinstance(v, Clip)]
    if not clips:
        return _of_pictures(processor, text, visuals)
    if getattr(processor, "video_processor", None) is not None:
        return _by_its_video_part(processor, text, visuals)
    if not hasattr(getattr(processor, "image_processor", None), "temporal_patch_size"):
        raise RunError(
            f"{type(processor).__name__} makes no inputs of videos here; install torchvision, which its video part "
            "needs, or compare on pictures"
        )
    return _by_hand(processor, text, visuals, clips)


def _of_pictures(processor: Any, text: Sequence[str], pictures: Sequence[Any]) -> BatchFeature:
    return processor(images=[[p] for p in pictures], text=list(text), padding=True, return_tensors="pt")


def _by_its_video_part(processor: Any, text: Sequence[str], visuals: Sequence[Image.Image | Clip]) -> BatchFeature:
    """With torchvision. Frames were chosen when they were read."""
    clips = [v for v in visuals if isinstance(v, Clip)]
    pictures = [[v] for v in visuals if not isinstance(v, Clip)]
    about = [
        {"fps": c.fps, "total_num_frames": len(c.frames), "frames_indices": list(range(len(c.frames)))} for c in clips
    ]
    return processor(
        text=list(text),
        images=pictures or None,
        videos=[np.stack([np.asarray(f) for f in c.frames]) for c in clips],
        video_metadata=about,
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )


def _by_hand(
    processor: Any, text: Sequence[str], visuals: Sequence[Image.Image | Clip], clips: Sequence[Clip]
) -> BatchFeature:
    """Pictures through the processor, clips cut into patches here; their rows are padded together."""
    videos = video_inputs(processor, clips)
    token, merge = processor.video_token, processor.image_processor.merge_size**2
    lengths = iter((videos["video_grid_thw"].prod(-1) // merge).tolist())
    pictures = [v for v in visuals if not isinstance(v, Clip)]
    asked = [prompt for prompt, v in zip(text, visuals, strict=True) if not isinstance(v, Clip)]
    seen = dict(processor(images=[[p] for p in pictures], text=asked)) if pictures else {}
    of_pictures = iter(seen.pop("input_ids", []))
    ids = [
        processor.tokenizer(prompt.replace(token, token * next(lengths)))["input_ids"]
        if isinstance(v, Clip)
        else list(next(of_pictures))
        for prompt, v in zip(text, visuals, strict=True)
    ]
    made = processor.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
    types = torch.tensor(processor.create_mm_token_type_ids(made["input_ids"].tolist()))
    pixels = {name: torch.as_tensor(np.asarray(seen[name])) for name in ("pixel_values", "image_grid_thw") if seen}
    return BatchFeature({**made, "mm_token_type_ids": types, **pixels, **videos})


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
