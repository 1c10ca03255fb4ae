"""Checks of what was typed, shared by all commands, and the exit codes of a command line.

An option is given once unless its help says that it can be repeated, a name is not blank, a whole number fits 32 bits.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from ..core import interrupts
from ..core.errors import RunError, TokPruneError, shown
from ..prune.saved import read_saved

MOST = 2**31 - 1  # no picture, prompt or run has more of anything
FREE = ("suffix", "question", "model_args", "gen_kwargs")  # free text, which may be empty


class Command(TyperCommand):
    """A command that checks what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does, with the checks of this module.

        Raises:
            RunError: an option is given twice or blank, or a number is too large.
        """
        if args or not self.no_args_is_help:
            given, _, order = self._parsed(ctx, args)
            if not any(parameter.is_eager for parameter in order):  # --help helps, whatever else is there
                _check_once(order)
                for parameter in order:
                    _check_named(parameter, given.get(str(parameter.name)))
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            _check_size(parameter, ctx.params.get(str(parameter.name)))
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments first, then options by their groups; those of no group come last."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_option = parameter.param_type_name == "option"
                title = (getattr(parameter, "rich_help_panel", None) or "Options") if is_option else "Arguments"
                groups.setdefault(title, []).append(record)
        groups["Options"] = groups.pop("Options", [])
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def _parsed(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[Any]]:
        """What the parser makes of the arguments; its errors know the command."""
        try:
            return self.make_parser(ctx).parse_args(args=list(args))
        except Exception as error:
            if hasattr(error, "format_message"):
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


class App(typer.Typer):
    """Commands that check what was typed."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": Command, **options})


def run(app: typer.Typer) -> None:
    """Run a command line and end the process; bad input gives one line on stderr and exit code 2."""
    try:
        interrupts.end()
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        sys.exit(interrupts.CODE)
    except TokPruneError as error:
        _fail(str(error))
    except Exception as error:
        # Usage errors of the command-line library, which may be vendored: told apart by what they carry.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            sys.exit(2)
        said = error.format_message()
        _fail(f"{said}{'' if said.endswith(('.', '?')) else '.'} See {_command(error)} --help")


def check_most(option: str, number: int, most: int = MOST) -> None:
    """Raise RunError if the absolute value of a whole number is above `most`."""
    if abs(number) > most:
        raise RunError(f"invalid {option} of {len(str(abs(number)))} digits: use a whole number of at most {most}")


def check_least(**numbers: int | None) -> None:
    """Raise RunError for the first option below 1; None is not given. Options as names of variables."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise RunError(f"invalid --{name.replace('_', '-')} {number}: use a whole number of at least 1")


def check_fraction(option: str, ratio: float) -> None:
    """Raise RunError unless a number is in (0, 1]."""
    if not 0 < ratio <= 1:
        meant = f"did you mean {option} {ratio / 100:g}?" if 2 <= ratio <= 100 else f"use {option} 0.25"
        raise RunError(f"{option} {ratio:g} is not a fraction in (0, 1]: {meant}")


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers of an option, which commas separate; each once.

    Raises:
        RunError: there is something else.
    """
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise RunError(f"{option} {shown(text)} is not a list of whole numbers: use {option} 1,8") from error
    for number in found:
        check_most(option, number)
    return found


def ratios(text: str) -> list[float]:
    """The fractions of --keep, which commas separate.

    Raises:
        RunError: there is something else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RunError(f"--keep {shown(text)} is not a list of fractions: use {_as_fractions(text)}") from error
    for ratio in found:
        check_fraction("--keep", ratio)
    return found


def _as_fractions(text: str) -> str:
    """What was meant by percentages; an example for anything else."""
    try:
        meant = [float(part.strip().removesuffix("%")) / 100 for part in text.split(",")]
    except ValueError:
        meant = []
    is_meant = meant and all(0 < ratio <= 1 for ratio in meant)
    return "--keep " + (",".join(f"{ratio:g}" for ratio in meant) if is_meant else "0.5,0.25")


def names(text: str) -> list[str]:
    """What commas separate, without blanks."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def saved_folders(folders: Sequence[Path] | None) -> list[str]:
    """The folders of --config as methods.

    Raises:
        SavedError: one is no saved folder, or is broken.
    """
    for folder in folders or ():
        read_saved(folder)
    return [str(folder) if os.sep in str(folder) else f".{os.sep}{folder}" for folder in folders or ()]


def _command(error: Any) -> str:
    """The command that an error of usage is about, as it is typed."""
    context = getattr(error, "ctx", None)
    name = context.info_name if context is not None and context.parent is not None else ""
    return f"tokprune {name}".strip()


def _check_once(order: list[Any]) -> None:
    """Raise if an option is repeated, since the last one would silently win."""
    for parameter, n in Counter(order).items():
        if n > 1 and not getattr(parameter, "multiple", False):
            joined = ", with commas between the values" if "commas" in (parameter.help or "") else ""
            raise RunError(f"{_flag(parameter)} is given {n} times: use it once{joined}")


def _check_named(parameter: Any, value: Any) -> None:
    """Raise if a text, or one of several, is blank."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if parameter.name in FREE or not any(isinstance(v, str) and not v.strip(" \t\r\n\v\f,") for v in values):
        return
    said = (parameter.help or "a value").rstrip(".")
    listed = _existing(parameter, said)
    raise RunError(f"{_flag(parameter)} is blank; it takes: {said}{listed and f'. Available: {listed}'}")


def _existing(parameter: Any, said: str) -> str:
    """The names that an option takes, where its help does not list them."""
    if parameter.name in ("method", "methods", "score"):
        import tokprune

        return ", ".join(tokprune.list_methods())
    if "known shape" in said.lower():
        from ..cost.shapes import KNOWN

        return ", ".join(KNOWN)
    return ""


def _check_size(parameter: Any, value: Any) -> None:
    if isinstance(value, int):
        check_most(_flag(parameter), value)


def _flag(parameter: Any) -> str:
    """--keep for an option, IMAGE for a positional argument."""
    if parameter.param_type_name != "option":
        return str(parameter.name).upper()
    return next((o for o in parameter.opts if o.startswith("--")), parameter.opts[0])


def _fail(message: str) -> None:
    typer.echo(f"tokprune: {' '.join(message.split())}", err=True)
    sys.exit(2)
