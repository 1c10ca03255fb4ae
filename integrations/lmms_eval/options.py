"""What `--model_args` takes, read by the types declared here, and what a task's generation settings become."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import StoppingCriteria

import tokprune
from tokprune.errors import OptionError, RunError

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
        revision: of a hub id.
        dtype: such as bfloat16; the checkpoint's own on a GPU and float32 elsewhere where it is left out.
        device: such as cuda:1; where it is left out, the GPU of this process, or the CPU.
        device_map: such as auto, to spread a model over several GPUs.
        attn_implementation: sdpa, eager or flash_attention_2.
        batch_size: requests at a time.
        max_new_tokens: where an answer is cut, for tasks that do not say.
        suffix: added to every question, such as " Answer with a single word or phrase."
        system_prompt: said before the question; a text or a file that holds it.
        record: a file that gets one JSON line a request.
    """

    pretrained: str
    method: str = NONE
    keep_ratio: float | tuple[float, ...] | None = None
    keep_tokens: int | tuple[int, ...] | None = None
    flops_ratio: float | None = None
    flops_scope: str | None = None
    flops_text: int | None = None
    positions: str | None = None
    newlines: str | None = None
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    batch_size: int = 1
    max_new_tokens: int = 1024
    suffix: str = ""
    system_prompt: str = ""
    record: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From texts, as on a command line, or from values.

        Raises:
            TokPruneError: an argument that does not exist or whose value cannot be; what to type instead is said.
        """
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(_unknown(name, known))
        if not given.get("pretrained"):
            raise OptionError("no model named; type --model_args pretrained=FOLDER_OR_HUB_ID,method=vtc_cls,...")
        read = {name: _read(name, value) for name, value in given.items()}
        options = cls(**{name: value for name, value in read.items() if value is not None})
        options._check()
        return options

    def _check(self) -> None:
        if self.dtype not in (None, "auto") and not isinstance(getattr(torch, self.dtype or "", None), torch.dtype):
            raise OptionError(f"dtype={self.dtype!r} is no type of torch; type dtype=bfloat16, float16 or float32")
        if not self.is_bare:
            tokprune.get_method(self.method)
            return
        if self.attach:
            name = next(iter(self.attach))
            raise OptionError(
                f"method=none is the bare model and takes no {name}; leave {name} out, or name a method, as "
                f"method=vtc_cls,{name}={_typed(self.attach[name])}"
            )

    @property
    def is_bare(self) -> bool:
        """Whether nothing is pruned."""
        return self.method == NONE

    @property
    def attach(self) -> dict[str, Any]:
        """The arguments of `tokprune.attach` that were given."""
        values = {name: getattr(self, name) for name in ATTACH}
        return {name: value for name, value in values.items() if value is not None}


def split_arguments(text: str) -> dict[str, str]:
    """`a=1,b=x:y=z,c=0.5,0.25` as a dict of texts: a comma ends a value only where a name and "=" follow it.

    Raises:
        OptionError: a part without a name, or a name twice.
    """
    found: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in re.split(r",(?=\s*\w+=)", text.strip().rstrip(",")))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"{part!r} in --model_args is no argument; type name=value,name=value")
        if name in found:
            raise OptionError(f"{name} is in --model_args twice ({found[name]}, {value}); leave one out")
        found[name] = value
    return found


def merged(given: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments with lmms-eval's own flags; a batch size of 1, which nobody has to type, gives way.

    Raises:
        OptionError: both say something, and not the same.
    """
    out = dict(given)
    for name, value in flags.items():
        if value is None or (name == "batch_size" and str(value) == "1" and name in given):
            continue
        if name == "max_batch_size":
            raise OptionError("--max_batch_size is for automatic batch sizes; type --batch_size 8 alone")
        if name in out and str(out[name]) != str(value):
            raise OptionError(f"--{name} {value} and {name}={out[name]} in --model_args differ; leave one out")
        out[name] = value
    return out


def _unknown(name: str, known: list[str]) -> str:
    if name == "keep":
        return "keep is no model argument; type keep_ratio=0.25 (a fraction of the tokens) or keep_tokens=64 (a count)"
    if name == "trust_remote_code":
        return "trust_remote_code is no model argument: tokprune runs no code from the hub; leave it out"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"no model argument {name!r}.{hint} There are: {', '.join(known)}. Options of a method go into its "
        "specification, as method=vtc_cls:start_layer=2"
    )


def _read(name: str, value: Any) -> Any:
    """A value of an argument from its text; None where it is empty."""
    if value is None or value == "":
        return None
    try:
        if name == "keep_ratio":
            return _numbers(value, float)
        if name == "keep_tokens":
            return _numbers(value, int)
        if name == "flops_ratio":
            return float(value)
        if name in ("batch_size", "max_new_tokens", "flops_text"):
            return _at_least_one(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name}={value} is not {WANTED[name]}; type {EXAMPLES[name]}") from error
    return str(value)


WANTED = {
    "keep_ratio": "a fraction in (0, 1]",
    "keep_tokens": "a whole number",
    "flops_ratio": "a fraction in (0, 1]",
    "batch_size": "a whole number of at least 1",
    "max_new_tokens": "a whole number of at least 1",
    "flops_text": "a whole number of at least 1",
}
EXAMPLES = {
    "keep_ratio": "keep_ratio=0.25, or keep_ratio=0.5/0.25 for two joined methods",
    "keep_tokens": "keep_tokens=64, or keep_tokens=128/64 for two joined methods",
    "flops_ratio": "flops_ratio=0.3",
    "batch_size": "--batch_size 8",
    "max_new_tokens": "max_new_tokens=16",
    "flops_text": "flops_text=64",
}


def _numbers(value: Any, kind: type) -> Any:
    """One number, or a tuple where there are several: 0.25, 0.5/0.25 or 0.5,0.25."""
    if isinstance(value, str):
        value = [kind(part) for part in re.split("[/,]", value.strip("[]()"))]
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) > 1 else value[0]
    return value  # checked by attach


def _at_least_one(value: Any) -> int:
    number = int(value)
    if number < 1 or str(number) != str(value):
        raise ValueError
    return number


def _typed(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ------------------------------------------------------------------------------------------ generation


def generation(given: Mapping[str, Any], max_new_tokens: int, eos: str) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate` from a task's generation_kwargs, and the texts that end an answer.

    Sampling starts with a temperature above 0, unless do_sample is false. What `generate` does not know here is left
    out, as lmms-eval's own models leave it out.

    Args:
        given: `generation_kwargs` of a task, with those of `--gen_kwargs`.
        max_new_tokens: for tasks that do not say.
        eos: the tokenizer's end, which needs no text to be looked for.

    Raises:
        RunError: `until` is neither a text nor a list of texts.
    """
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(text, str) for text in until):
        raise RunError(f"until={until!r} in the task's generation_kwargs is no text or list of texts")
    asked = given.get("max_new_tokens")
    out: dict[str, Any] = {
        "max_new_tokens": int(asked) if asked else max_new_tokens,
        "num_beams": int(given.get("num_beams") or 1),
        "do_sample": False,
    }
    out |= {name: given[name] for name in PASSED_ON if given.get(name) is not None}
    temperature = float(given.get("temperature") or 0)
    if temperature > 0 and given.get("do_sample") is not False:
        out |= {"do_sample": True, "temperature": temperature}
        out |= {name: given[name] for name in SAMPLING if given.get(name) is not None}
    return out, [text for text in until if text and text != eos]


def cut(text: str, stops: list[str]) -> str:
    """The text before the first of the texts that end it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


class Until(StoppingCriteria):
    """Ends a row when its answer holds one of some texts.

    It reads the end of the decoded answer, so it takes every tokenizer; that of transformers needs a vocabulary with
    certain letters in it.

    Args:
        stops: the texts.
        tokenizer: of the model.
        n_prompt: columns of the prompt.
    """

    def __init__(self, stops: list[str], tokenizer: Any, n_prompt: int):
        self.stops, self.tokenizer, self.n_prompt = stops, tokenizer, n_prompt
        self.n_last = 16 + 4 * max(map(len, stops))  # tokens that surely hold a text that has just come to its end

    def __call__(self, input_ids: torch.Tensor, scores: Any, **ignored: Any) -> torch.Tensor:
        """Whether each row ends, (B,) bool."""
        last = input_ids[:, self.n_prompt :][:, -self.n_last :]
        texts = self.tokenizer.batch_decode(last, skip_special_tokens=True)
        return torch.tensor([cut(text, self.stops) != text for text in texts], device=input_ids.device)
