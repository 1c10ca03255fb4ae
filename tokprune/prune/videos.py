"""Videos: a folder of frames, or a file that PyAV decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..core.errors import TaskError
from .pictures import as_rgb, open_picture

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
N_FRAMES = 8
FOLDER_FPS = 2.0  # what a folder of frames is taken for, and what the processors of Qwen sample at


@dataclass(frozen=True)
class Clip:
    """A video: its frames, RGB, all of one size, and how many of them a second shows."""

    frames: tuple[Image.Image, ...]
    fps: float = 2.0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame."""
        return self.frames[0].size

    def some_frames(self, share: float) -> Clip:
        """With a share of its frames, at least one, evenly spaced, at the speed that fits."""
        n = max(1, int(len(self.frames) * share + 0.5))
        frames = tuple(self.frames[i] for i in evenly(len(self.frames), n))
        return Clip(frames, self.fps * n / len(self.frames))

    def resize(self, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC) -> Clip:
        """With frames of another width and height, as the method of a picture."""
        return Clip(tuple(frame.resize(size, resample) for frame in self.frames), self.fps)


def is_video(path: Path) -> bool:
    """Whether a path is a folder of frames or has the suffix of a video file."""
    return path.is_dir() or path.suffix.lower() in SUFFIXES


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES)


def open_clip(path: Path, n_frames: int = N_FRAMES, instead: str = "name another video") -> Clip:
    """A video with at most so many frames, evenly spaced from the first to the last.

    Args:
        path: a folder of pictures, shown in the order of their names at 2 frames a second; or a video file.
        n_frames: at least 1.
        instead: what to do about one that cannot be read, for the message.

    Raises:
        TaskError: it cannot be read, has no frame, or frames of different sizes.
    """
    clip = _of_folder(path, n_frames, instead) if path.is_dir() else _of_file(path, n_frames, instead)
    sizes = {frame.size for frame in clip.frames}
    if len(sizes) > 1:
        shown = " and ".join(f"{w} x {h}" for w, h in sorted(sizes)[:2])
        raise TaskError(f"frames of {path} differ in size ({shown}); {instead}, or make its frames one size")
    return clip


def evenly(n_all: int, n: int) -> list[int]:
    """Up to `n` indices of `n_all`, ascending, from the first to the last."""
    if n >= n_all or n == 1:
        return list(range(min(n, n_all)))
    return [round(i * (n_all - 1) / (n - 1)) for i in range(n)]


def _of_folder(path: Path, n_frames: int, instead: str) -> Clip:
    files = frame_files(path)
    if not files:
        raise TaskError(f"cannot read {path}: it is a folder without frames ({', '.join(FRAME_SUFFIXES)}); {instead}")
    chosen = evenly(len(files), n_frames)
    return Clip(tuple(open_picture(files[i], instead) for i in chosen), FOLDER_FPS * len(chosen) / len(files))


def _of_file(path: Path, n_frames: int, instead: str) -> Clip:
    try:
        n_all, seconds = _length(path)
        chosen = evenly(n_all, n_frames)
        wanted = set(chosen)
        frames = tuple(as_rgb(f.to_image()) for i, f in enumerate(_decoded(path)) if i in wanted)
    except ImportError as error:
        raise TaskError("video files need PyAV: pip install 'tokprune[video]'; or use a folder of frames") from error
    except Exception as error:  # whatever a broken file makes PyAV raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TaskError(f"cannot read the video {path}: {said}; {instead}") from error
    if not frames:
        raise TaskError(f"the video {path} has no frames; {instead}")
    return Clip(frames, len(frames) / seconds if seconds else FOLDER_FPS)


def _decoded(path: Path) -> Iterator:
    import av

    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def _length(path: Path) -> tuple[int, float]:
    """Number of frames and seconds; counted, since headers may lack or misstate them."""
    n, last = 0, 0.0
    for frame in _decoded(path):
        n, last = n + 1, frame.time or last
    return n, last * n / (n - 1) if n > 1 else 0.0
