"""What a sweep measures, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tokprune.core.errors import RunError

METHODS = ("uniform", "vtc_cls", "divprune", "fastv")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDEST = 16384  # pixels a side


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    Args:
        shape: a known shape, built with random weights; empty if `model` is given.
        model: an embedded model, a local folder or a hub id.
        methods: compared with the unpruned model; empty for the default ones that the model can run.
        keep: ratios.
        batch_sizes, new_tokens, resolutions: values to sweep over; no resolution means the family's default.
        picture: a picture to measure on instead of square ones of smooth noise; None for these.
        n_text: text tokens in a prompt.
        rounds, warmup: measured rounds, and rounds before them that are not measured.
        dtype: empty for float32 on a CPU and bfloat16 on a GPU.
        attn: attention implementation.
        device: empty for the GPU if there is one.
        layers, vision_layers: build a shape with fewer layers of the same width.
    """

    shape: str = ""
    model: str = ""
    methods: Sequence[str] = ()
    keep: Sequence[float] = (0.25,)
    batch_sizes: Sequence[int] = (1,)
    new_tokens: Sequence[int] = (16,)
    resolutions: Sequence[int] = ()
    picture: Path | None = None
    n_text: int = 64
    rounds: int = 6
    warmup: int = 1
    dtype: str = ""
    attn: str = "sdpa"
    device: str = ""
    layers: int | None = None
    vision_layers: int | None = None

    def check(self) -> None:
        """Raise RunError if a setting is invalid."""
        if bool(self.shape) == bool(self.model):
            raise RunError("give a shape or a model: --shape llava-1.5-7b (random weights) or --model tiny-llava")
        if self.model and (self.layers or self.vision_layers):
            raise RunError("--layers and --vision-layers scale a shape; leave them out with --model")
        numbers = {"--batch-size": self.batch_sizes, "--new-tokens": self.new_tokens, "--resolution": self.resolutions}
        for option, values in {**numbers, "--text": [self.n_text], "--rounds": [self.rounds]}.items():
            if any(n < 1 for n in values):
                raise RunError(f"{option} takes whole numbers of at least 1")
        if max(self.resolutions, default=0) > WIDEST:
            raise RunError(f"--resolution takes at most {WIDEST} pixels a side")
        if self.picture and (self.resolutions or tuple(self.batch_sizes) != (1,)):
            raise RunError("--picture is one picture of its own size: leave --resolution and --batch-size out")
        if self.n_text < 2 or self.warmup < 0:
            raise RunError("--text takes at least 2 tokens, one on each side of the picture, and --warmup at least 0")
        if self.dtype and self.dtype not in DTYPES:
            raise RunError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            RunError: torch finds no such device.
        """
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise RunError(f"invalid --device {self.device!r}; type cpu or cuda") from error
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
            raise RunError(f"torch finds no device {self.device!r}; type --device cpu")
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and cache."""
        return DTYPES[self.dtype or ("bfloat16" if self.torch_device.type == "cuda" else "float32")]
