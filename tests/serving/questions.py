"""The questions that both sides answer; "tiny-qwen:clips" is a model that is asked about clips."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from tokprune.eval.tasks import load_task

from tokprune.prune.videos import Clip

N_TOKENS = 8
TASKS = {
    "tiny-llava": "findit",
    "tiny-llava-next": "findit_hd",
    "tiny-qwen": "findit",
    "clips": "watchit",
}
QWEN, QWEN_CLIP = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
SIZES = ((128, 64), (64, 128), (96, 96), (64, 112))  # of pictures for models that take any
# Of models with random weights: how a prompt shows a picture, and sizes of pictures.
SHOWN = {
    "random-onevision": ("<image>", ((192, 150), (96, 40), (50, 140), (60, 60))),
    "random-internvl": ("<IMG_CONTEXT>", ((192, 130), (130, 64), (50, 140), (60, 60))),
    "random-gemma3": ("<start_of_image>", ((192, 130), (50, 140), (60, 60), (96, 96))),
    "random-mistral3": ("[IMG]", ((192, 130), (50, 140), (60, 66), (250, 90))),
    "random-qwen3": (QWEN, SIZES),
}


def model_of(name):
    """An embedded model, or a folder."""
    return name.partition(":")[0]


def task_of(name):
    """Of clips, or by the name of the model."""
    model, _, clips = name.partition(":")
    return TASKS.get(clips or Path(model).name, "findit")


def asked(task_name, n):
    """(sample, picture, prompt), n of them over the whole task."""
    task = load_task(task_name)
    samples = task.samples()
    samples = samples[:: max(1, len(samples) // n)][:n]
    return [(s, task.image(s.image_id), f"USER: <image>\n{s.question} ASSISTANT:") for s in samples]


def shown(model_name, samples):
    """(sample, pictures, clips, prompt) as a model takes them.

    Pictures are of several sizes where a model takes any, and two in every fourth prompt; with clips, every fourth
    prompt has a picture, too, and every fourth clip fewer frames, of another size.
    """
    if model_name.endswith(":clips"):
        return [_clips(i, samples) for i in range(len(samples))]
    name = Path(model_name).name
    if "qwen" not in name and name not in SHOWN:
        return [(sample, [image], [], prompt) for sample, image, prompt in samples]
    placeholder, sizes = SHOWN.get(name, (QWEN, SIZES))
    mark = "<image>\n" if name in SHOWN else "<image>"  # vLLM finds no picture of Gemma 3 with a line break behind it
    found = []
    for i, (sample, image, prompt) in enumerate(samples):
        pictures = [image.resize(sizes[j % 4]) for j in ((i, i + 1) if i % 4 == 3 else (i,))]
        found.append((sample, pictures, [], prompt.replace(mark, placeholder * len(pictures))))
    return found


def _clips(i, samples):
    sample, clip, prompt = samples[i]
    if i % 4 == 1:
        clip = Clip(clip.frames[:6], clip.fps).resize((80, 48))
    pictures = [clip.frames[0].resize(SIZES[1])] if i % 4 == 3 else []
    return sample, pictures, [clip], prompt.replace("<image>", QWEN * len(pictures) + QWEN_CLIP)


def frames_of(clip):
    """Frames, and what a processor wants to know of them."""
    n = len(clip.frames)
    frames = np.stack([np.asarray(frame) for frame in clip.frames])
    return frames, {"fps": clip.fps, "total_num_frames": n, "frames_indices": list(range(n))}


def salt(image):
    """What the plug-in draws with for a picture or clip, written out here by hand."""
    return zlib.crc32(np.asarray(image).tobytes())
