"""The arguments of `--model_args`, and the generation settings of a task."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import StoppingCriteria

import tokprune
from tokprune.core.budget import Scope
from tokprune.core.errors import OptionError, RunError, shown
from tokprune.core.registry import check, parse, unknown_option
from tokprune.prune.request import Newlines, Positions

NONE = "none"
ATTACH = ("keep_ratio", "keep_tokens", "flops_ratio", "flops_scope", "flops_text", "positions", "newlines")
SAMPLING = ("top_p", "top_k")
PASSED_ON = ("repetition_penalty", "length_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True)
class Options:
    """Arguments of the model `tokprune`.

    Args:
        pretrained: a local folder or a hub id. Code from the hub is never run.
        method: a name, a specification such as fopru:strategy=row, several joined by +, or none for the bare model.
        keep_ratio, keep_tokens, flops_ratio, flops_scope, flops_text: the budget, as `tokprune.attach` takes it; for
            two joined methods keep_ratio=0.5/0.25.
        positions, newlines: as `tokprune.attach` takes them.
        revision: of the hub id.
        dtype: such as bfloat16. Default: the checkpoint's own on a GPU, float32 on a CPU.
        device: such as cuda:1. Default: the GPU of this process, or the CPU.
        device_map: such as auto, to spread a model over several GPUs.
        attn_implementation: sdpa, eager or flash_attention_2.
        batch_size: requests per batch.
        max_new_tokens: maximum length of an answer, for tasks that set none.
        frames: frames to take of a video, evenly spaced.
        suffix: text added to every question, such as " Answer with a single word or phrase."
        system_prompt: a text, or a file that holds it.
        record: a file for one JSON line per request.
    """

    shown_as: ClassVar[str] = "--model_args"

    pretrained: str
    method: str = NONE
    keep_ratio: float | tuple[float, ...] | None = field(default=None, metadata={"example": "0.25 or 0.5/0.25"})
    keep_tokens: int | tuple[int, ...] | None = field(default=None, metadata={"example": "64 or 128/64"})
    flops_ratio: float | None = field(default=None, metadata={"example": "0.3"})
    flops_scope: Scope | None = None
    flops_text: int | None = field(default=None, metadata={"example": "64"})
    positions: Positions | None = None
    newlines: Newlines | Literal["auto"] | None = None
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    batch_size: int = field(default=1, metadata={"example": "8"})
    max_new_tokens: int = field(default=1024, metadata={"example": "16"})
    frames: int = field(default=8, metadata={"example": "8"})
    suffix: str = ""
    system_prompt: str = ""
    record: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From texts, as on a command line, or from values.

        Raises:
            TokPruneError: an argument does not exist, or its value is invalid.
        """
        for name in given:
            if name in _REFUSED:
                raise OptionError(_REFUSED[name])
            if name not in cls.__dataclass_fields__:
                own = "Options of a method go into method=, as method=vtc_cls:start_layer=2"
                raise OptionError(f"{unknown_option(cls, name)}. {own}")
        if not str(given.get("pretrained") or "").strip():
            raise OptionError("no model named: use --model_args pretrained=FOLDER_OR_HUB_ID,method=vtc_cls,...")
        if isinstance(given.get("method"), str) and not given["method"].strip():
            raise OptionError(f"no method named: use method=none, or one of: {', '.join(tokprune.list_methods())}")
        options = cls(**{name: _read(cls, name, value) for name, value in given.items() if value not in (None, "")})
        options._check()
        return options

    def _check(self) -> None:
        for name in ("batch_size", "max_new_tokens", "frames"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} is too small: use {name}=1 or more")
        if self.dtype not in (None, "auto") and not isinstance(getattr(torch, self.dtype or "", None), torch.dtype):
            raise OptionError(f"invalid dtype={self.dtype}: use dtype=bfloat16, dtype=float16 or dtype=float32")
        if not self.is_bare:
            tokprune.get_method(self.method)
            return
        if self.attach:
            name = next(iter(self.attach))
            raise OptionError(
                f"method=none runs the bare model, so it takes no {name}: leave {name} out, or use "
                f"method=vtc_cls,{name}={_typed(self.attach[name])}"
            )

    @property
    def is_bare(self) -> bool:
        return self.method == NONE

    @property
    def attach(self) -> dict[str, Any]:
        """The arguments of `tokprune.attach` that were given."""
        values = {name: getattr(self, name) for name in ATTACH}
        return {name: value for name, value in values.items() if value is not None}


def split_arguments(text: str) -> dict[str, str]:
    """`a=1,b=x:y=z,c=0.5,0.25` as a dict of texts: a comma ends a value only if a name and "=" follow it.

    Raises:
        OptionError: a part without a name, or a name twice.
    """
    found: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in re.split(r",(?=\s*\w+=)", text.strip().rstrip(",")))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"invalid argument {part!r} in --model_args: use name=value,name=value")
        if name in found:
            raise OptionError(f"{name} is given twice in --model_args ({found[name]}, {value}): leave one out")
        found[name] = value
    return found


def merged(given: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments with lmms-eval's own flags; --batch_size 1 is its default and does not count.

    Raises:
        OptionError: a flag and an argument differ.
    """
    out = dict(given)
    for name, value in flags.items():
        if value is None or (name == "batch_size" and str(value) == "1" and name in given):
            continue
        if name == "max_batch_size":
            raise OptionError("automatic batch sizes are not supported: use --batch_size 8, without --max_batch_size")
        if name in out and str(out[name]) != str(value):
            raise OptionError(f"--{name} {value} and {name}={out[name]} in --model_args differ: leave one out")
        out[name] = value
    return out


_REFUSED = {
    "keep": "unknown argument 'keep': did you mean keep_ratio=0.25 or keep_tokens=64?",
    "trust_remote_code": "tokprune runs no code from the hub: leave trust_remote_code out",
}


def _read(cls: type, name: str, value: Any) -> Any:
    """The value of an argument by its declared type, from a text or a value.

    Raises:
        OptionError: no such argument, or the value does not fit.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        value = parse(cls, name, value)
    elif isinstance(value, list):
        value = tuple(value)
    check(cls, name, value)
    return value


def _typed(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ------------------------------------------------------------------------------------------ generation


def generation(given: Mapping[str, Any], max_new_tokens: int, eos: str) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate` from a task's generation_kwargs, and the texts that end an answer.

    A temperature above 0 turns sampling on, unless do_sample is false. Other settings are ignored, as in lmms-eval's
    own models.

    Args:
        given: `generation_kwargs` of a task, with those of `--gen_kwargs`.
        max_new_tokens: for tasks that set none.
        eos: the tokenizer's end token, which stops generation anyway.

    Raises:
        RunError: a setting is of a wrong type or out of range.
    """
    read = {name: _setting(name, value) for name, value in given.items() if name in SETTINGS and value is not None}
    out: dict[str, Any] = {
        "max_new_tokens": read.get("max_new_tokens") or max_new_tokens,
        "num_beams": read.get("num_beams") or 1,
        "do_sample": False,
    }
    out |= {name: read[name] for name in PASSED_ON if name in read}
    if read.get("temperature", 0) > 0 and read.get("do_sample") is not False:
        out |= {"do_sample": True, "temperature": read["temperature"]}
        out |= {name: read[name] for name in SAMPLING if name in read}
    return out, [text for text in read.get("until", ()) if text and text != eos]


def _whole(value: Any) -> int:
    """A whole number that fits 32 bits, from a number or its text."""
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or number != int(number) or not abs(number) < 2**31:
        raise ValueError
    return int(number)


def _number(value: Any) -> float:
    """A finite number, from a number or its text."""
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _yes_or_no(value: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    return known[str(value).lower()]


def _texts(value: Any) -> list[str]:
    """Texts that end an answer."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    return list(texts)


# How a setting is read, its range, its description, and an example.
SETTINGS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool], str, str]] = {
    "max_new_tokens": (_whole, lambda n: n >= 0, "a whole number of at least 1", "16"),
    "num_beams": (_whole, lambda n: n >= 0, "a whole number of at least 1", "1"),
    "temperature": (_number, lambda x: x >= 0, "a number of at least 0", "0"),
    "top_p": (_number, lambda x: 0 <= x <= 1, "a number from 0 to 1", "0.9"),
    "top_k": (_whole, lambda n: n >= 0, "a whole number of at least 0", "50"),
    "repetition_penalty": (_number, lambda x: x > 0, "a number above 0", "1.1"),
    "length_penalty": (_number, lambda x: True, "a number", "1.0"),
    "no_repeat_ngram_size": (_whole, lambda n: n >= 0, "a whole number of at least 0", "3"),
    "do_sample": (_yes_or_no, lambda x: True, "true or false", "false"),
    "until": (_texts, lambda x: True, "a text or a list of texts", "."),
}


def _setting(name: str, value: Any) -> Any:
    """A setting by its type.

    Raises:
        RunError: it is of another type, or out of range.
    """
    read, fits, wanted, example = SETTINGS[name]
    try:
        found = read(value)
        if fits(found):
            return found
    except (TypeError, ValueError, OverflowError, KeyError):
        pass
    raise RunError(
        f"{name}={shown(value)} in --gen_kwargs or the task's generation_kwargs is not {wanted}: use --gen_kwargs "
        f"{name}={example}"
    )


def cut(text: str, stops: list[str]) -> str:
    """The text before the first of the texts that end it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


class Until(StoppingCriteria):
    """Ends a row when its answer contains one of some texts.

    It decodes the end of the answer, so it works with every tokenizer; that of transformers needs certain letters in
    the vocabulary.

    Args:
        stops: the texts.
        tokenizer: of the model.
        n_prompt: columns of the prompt.
    """

    def __init__(self, stops: list[str], tokenizer: Any, n_prompt: int):
        self.stops, self.tokenizer, self.n_prompt = stops, tokenizer, n_prompt
        self.n_last = 16 + 4 * max(map(len, stops))  # enough tokens to hold the longest text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **ignored: Any) -> torch.Tensor:
        """Whether each row has ended, (B,) bool."""
        last = input_ids[:, self.n_prompt :][:, -self.n_last :]
        texts = self.tokenizer.batch_decode(last, skip_special_tokens=True)
        return torch.tensor([cut(text, self.stops) != text for text in texts], device=input_ids.device)
