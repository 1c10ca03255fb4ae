"""The model's prompt from a task's text, pictures and videos."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokprune.core.errors import RunError
from tokprune.prune.pictures import as_rgb
from tokprune.prune.videos import Clip, is_video, open_clip

Visual = Image.Image | Clip
MARK = "<image>"  # what tasks write where a picture belongs


def prompt(processor: Any, text: str, kinds: Sequence[str], system: str = "") -> str:
    """The text in the processor's chat template, or in LLaVA 1.5's if it has none.

    Pictures and videos go where the text has `<image>`, or before the text. If there are not as many `<image>` marks as
    visuals, the marks become plain text, like every other placeholder of the processor.

    Args:
        processor: of the model.
        text: as the task asks, without any template.
        kinds: "image" or "video" for each visual of the request.
        system: system prompt; empty for none.
    """
    parts = _parts(processor, text, len(kinds))
    if getattr(processor, "chat_template", None):
        left = iter(kinds)
        said = [{"type": next(left)} if part is None else {"type": "text", "text": part} for part in parts]
        turns = [{"role": "user", "content": said}]
        if system:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return processor.apply_chat_template(turns, add_generation_prompt=True)
    said_ = "".join(f"{MARK}\n" if part is None else part for part in parts)
    return f"{system} USER: {said_} ASSISTANT:".lstrip()


def _parts(processor: Any, text: str, n_images: int) -> list[str | None]:
    """Pieces of text, and None for a picture."""
    pieces = text.split(MARK)
    if not n_images or len(pieces) - 1 != n_images:
        return [*[None] * n_images, _plain(processor, text)]
    joined = itertools.chain.from_iterable((None, _plain(processor, piece)) for piece in pieces)
    return [part for part in itertools.islice(joined, 1, None) if part is None or part.strip()]


def _plain(processor: Any, text: str) -> str:
    """The text without placeholders: `<image>` becomes `image`."""
    names = ("image_token", "video_token")
    tokens = {MARK, *(t for t in (getattr(processor, name, None) for name in names) if isinstance(t, str) and t)}
    return re.sub("|".join(map(re.escape, sorted(tokens))), lambda match: match[0].strip("<|>"), text)


def pictures(visuals: Any, task: str, n_frames: int = 8) -> list[Visual]:
    """The pictures, as RGB, and videos of a document.

    Args:
        visuals: what the task's doc_to_visual returned: pictures, paths of videos, None or nothing, in lists or not.
        task: its name, for messages.
        n_frames: to take of a video, evenly spaced.

    Raises:
        RunError: one is a sound, another path, or a picture that cannot be read.
        TaskError: a video that cannot be read.
    """
    if visuals is None:
        return []
    if isinstance(visuals, Sequence) and not isinstance(visuals, str):
        return [picture for visual in visuals for picture in pictures(visual, task, n_frames)]
    if isinstance(visuals, str) and is_video(Path(visuals)):
        return [open_clip(Path(visuals), n_frames, f"leave the task {task} out")]
    if not isinstance(visuals, Image.Image):
        raise RunError(
            f"the task {task} gives {type(visuals).__name__} instead of pictures, which is not supported; "
            "leave the task out"
        )
    try:
        return [as_rgb(visuals)]
    except Exception as error:  # whatever a broken picture makes Pillow raise
        raise RunError(f"the task {task} has a picture that cannot be read: {error}") from error
