"""`tokprune serve`: vLLM's own server, with the options that prune."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import RunError, TokPruneError
from ..prune.request import request_of
from ..prune.saved import read_saved
from .arguments import App, check_most, ratios
from .extras import eval_module
from .options import METHODS, MODEL, OUTPUT, option

app = App()


@app.command(no_args_is_help=True, short_help="Serve a model with vLLM, pruned.")
def serve(
    model: Annotated[str, typer.Argument(help="An embedded model (tiny-llava), a local folder, or a hub id.")],
    method: Annotated[str, option(METHODS, "A name or specification, such as vtc_cls.")] = "none",
    keep: Annotated[str, option(METHODS, "Fraction of the visual tokens to keep.")] = "",
    keep_tokens: Annotated[int | None, option(METHODS, "Or number of tokens to keep of a picture.")] = None,
    config: Annotated[
        Path | None, option(METHODS, "Or a folder that attachment.save() wrote, with its own budget.", "--config")
    ] = None,
    dtype: Annotated[str, option(MODEL, "Of the weights, as vLLM takes it.")] = "auto",
    show: Annotated[bool, option(OUTPUT, "Print the command line of vLLM and end.", "--show")] = False,
    more: Annotated[list[str] | None, typer.Argument(help="Options of vllm serve, behind --.")] = None,
) -> None:
    """Start `vllm serve` with a method and a budget; it ends as that ends.

    Example: tokprune serve llava-hf/llava-1.5-7b-hf --method vtc_cls --keep 0.25 -- --port 8001 --max-model-len 4096
    """
    from tokprune.integrations.vllm import KEY, release, why_not

    given = _given(method, keep, keep_tokens, config)
    words = [_path(model), "--dtype", dtype, "--enable-prompt-tokens-details"]
    words += ["--mm-processor-kwargs", json.dumps({KEY: given})] if given else []
    words += more or []
    if show:
        typer.echo(shlex.join(["vllm", "serve", *words]))
        return
    if why := why_not(release()):
        raise RunError(f"{why}. --show prints the command line for another machine")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *words])


def _given(method: str, keep: str, keep_tokens: int | None, config: Path | None) -> dict[str, Any] | None:
    """What our key says; None for a server that prunes nothing.

    Raises:
        RunError: a method without a budget, a budget without a method, or both and a folder.
    """
    if config is not None:
        if method != "none" or keep or keep_tokens is not None:
            raise RunError("--config holds a method and its budget: leave --method, --keep and --keep-tokens out")
        read_saved(config)
        return {"config": str(config.resolve())}
    if method == "none":
        if keep or keep_tokens is not None:
            raise RunError("--keep and --keep-tokens need a method: use --method vtc_cls")
        return None
    if (keep == "") == (keep_tokens is None):
        raise RunError("give one budget: --keep 0.25 or --keep-tokens 64")
    if keep:
        return _checked({"method": method, "keep_ratio": _one(keep)}, "--keep")
    check_most("--keep-tokens", keep_tokens or 0)
    return _checked({"method": method, "keep_tokens": keep_tokens}, "--keep-tokens")


def _one(keep: str) -> float:
    found = ratios(keep)
    if len(found) != 1:
        raise RunError(f"--keep {keep}: a server has one budget; requests may set another, see docs/serving.md")
    return found[0]


def _checked(given: dict[str, Any], flag: str) -> dict[str, Any]:
    """What needs no model, before vLLM is imported."""
    budget = {name: value for name, value in given.items() if name != "method"}
    try:
        request_of(given["method"], **budget)
    except TokPruneError as error:
        raise RunError(f"--method {given['method']} {flag}: {error}") from error
    return given


def _path(model: str) -> str:
    models = eval_module("models", needs=())
    return str(models.path_of(model)) if model in models.EMBEDDED else model
