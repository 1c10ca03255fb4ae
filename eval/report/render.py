"""Renders the tables of the README and of docs/ from the committed rows in `eval/results/` and from the registries.

python -m tokprune.eval.report.render     # rewrite README.md and the pages of docs/ that have tables
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokprune.integrations.transformers import NEWEST, all_families

import tokprune
from tokprune.core.budget import REFERENCE_TEXT, Budget
from tokprune.core.layout import grid_layout
from tokprune.core.signals import Tower
from tokprune.cost.flops import Shape
from tokprune.cost.selection import SelectionCost
from tokprune.cost.shapes import known_shape
from tokprune.methods import METHODS
from tokprune.prune.report import ImageReport, Prefill, Report, describe_signals

from ..bench import ratios as bench_ratios
from ..bench import serving as bench_serving
from ..bench import tables as bench_tables
from ..bench.selection_times import Timed
from ..run.rows import Row, pooled
from . import gpu as gpu_tables
from . import method_pages, promised, reported
from .exports import markdown, markdown_tables
from .tables import COLUMNS, QUESTION_ONLY, accuracy, conditions, in_points, interval, of_kinds, order, times

RESULTS = Path(__file__).resolve().parent.parent / "results"
WITH_TABLES = ("benchmarks", "gpu", "methods", "models", "reported", "serving", "speed", "tune")
PAGES = tuple(map(Path, ("README.md", *(f"docs/{name}.md" for name in WITH_TABLES))))
N_METHODS = re.compile(r"(?<=\bAll )\d+(?= methods\b)")  # in running text
BLOCK = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
EASY_KINDS = ("colour", "shape", "existence", "position")


def read_rows(name: str) -> list[dict]:
    """The rows of a file in the results folder."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def _run(name: str) -> tuple[list[Row], dict[str, float | None]]:
    """The rows of a comparison, and its question-only floors by task."""
    lines = read_rows(name)
    floors = {r["task"]: r["value"] for r in lines if r["method"] == QUESTION_ONLY}
    return [Row.read(r) for r in lines if r["method"] != QUESTION_ONLY], floors


def _cells(row: Row, *names: str) -> list[str]:
    """The method in code, then some of `tables.COLUMNS`."""
    return [f"`{row.method}`", *(COLUMNS[name](row) for name in names)]


def comparison(name: str) -> str:
    """One table a task, floors first."""
    return markdown_tables(*_run(name), text=str) + "\n"


def grid(name: str) -> str:
    """A line for each method and a column for each ratio, for long lists of methods."""
    rows, floors = _run(name)
    shown = pooled(rows)
    ratios = sorted({r.keep_ratio for r in shown if r.keep_ratio is not None}, reverse=True)
    least, costs = ratios[-1], ("visual tokens", "LLM FLOPs", "prefill FLOPs", "prefill time")
    lines = [[QUESTION_ONLY, f"{value:.3f}", *[""] * (len(ratios) + 3)] for value in floors.values()]
    for method in dict.fromkeys(r.method for r in sorted(shown, key=lambda r: r.keep_ratio is not None)):
        by_ratio = {r.keep_ratio: r for r in shown if r.method == method}
        own = [accuracy(by_ratio[None]), *[""] * (len(ratios) - 1)] if None in by_ratio else []
        each = own or [accuracy(by_ratio[ratio]) for ratio in ratios]
        code, *costly = _cells(by_ratio.get(least) or by_ratio[None], *costs)
        lines.append([code, *each, *costly])
    head = ("method", *(f"keep {r:g}" for r in ratios), *(f"{c} at {least:g}" for c in ("placeholders", *costs[1:])))
    return f"{conditions(shown[0])}\n\n" + markdown(head, lines)


def frontier(name: str) -> str:
    """All configurations of a run, in the order of the FLOPs that the language model spent."""
    rows, floors = _run(name)
    shown = sorted(pooled(rows), key=lambda r: r.costs.llm_flops_after or 0)
    names = ("keep", "accuracy [95 %]", "visual tokens", "LLM FLOPs", "prefill FLOPs", "KV bytes")
    lines = [[QUESTION_ONLY, "", f"{value:.3f}", *[""] * 4] for value in floors.values()]
    lines += [_cells(row, *names) for row in shown]
    return f"{conditions(rows[0])}\n\n" + markdown(("method", *names), lines)


def bench(name: str) -> str:
    """Times and memory of a sweep, with a legend."""
    rows = [bench_tables.Row(**r) for r in read_rows(name)]
    parts = [f"{bench_tables.conditions_line(rows[0])}\n"]
    for title, header, lines in bench_tables.tables(rows):
        columns = [column.replace("\n", " ") for column in header]
        parts.append(f"**{title}**\n\n" + markdown(columns, [[f"`{first}`", *line] for first, *line in lines]))
    parts.append(" ".join(bench_tables.legend(rows)) + "\n")
    return "\n".join(parts)


def serve(name: str) -> str:
    """Throughput of a server at several concurrencies."""
    rows = [bench_serving.Row(**r) for r in read_rows(name)]
    table = markdown(bench_serving.HEADER, bench_serving.lines_of(rows))
    return f"{bench_serving.conditions_line(rows)}\n\n{table}\n{bench_serving.legend()}\n"


def equality(name: str) -> str:
    """What vLLM and transformers have in common, by model and method."""
    lines = []
    for r in read_rows(name):
        n, budget = r["questions"], ", ".join(f"{k}={v}" for k, v in r["setting"].items() if k != "method")
        kept = f"{r['kept_same']} of {r['kept_known']}" if r["setting"] else ""
        same = [f"{r[how]} of {n}" for how in ("same_singles", "same_together")]
        setting = f"`{r['setting']['method']}` {budget}" if r["setting"] else "no key"
        columns = f"{r['columns_before']:.0f} -> {r['columns']:.0f}" if r["setting"] else f"{r['columns']:.0f}"
        lines.append([r["model"], setting, *same, kept, f"{r['farthest']:.1e}", columns])
    header = ("model", "setting", "same answers, one by one", "all at once", "same kept rows")
    return markdown((*header, "largest difference of log-probabilities", "columns of a prompt"), lines)


def pairs(name: str) -> str:
    """Differences between configurations on the same questions."""
    lines = [
        [
            f"`{r['first']}`",
            f"`{r['second']}`",
            in_points(r["difference"], r["low"], r["high"]),
            str(r["n_samples"]),
        ]
        for r in read_rows(name)
    ]
    return markdown(("first", "second", "difference in points [95 %]", "questions"), lines)


def kinds(names: str) -> str:
    """Findit at the smallest budget by kind of question: four kinds together, and counting apart."""
    lines = []
    for name in names.split(","):
        rows = [row for row in _run(name)[0] if row.task == "findit"]
        least = min(r.keep_ratio for r in rows if r.keep_ratio is not None)
        shown = [r for r in pooled(rows) if r.keep_ratio in (None, least)]
        for row in sorted(shown, key=order):
            *shares, n = of_kinds(row, EASY_KINDS)
            keep = "" if row.keep_ratio is None else f"{row.keep_ratio:g}"
            each = [f"{row.by_kind[kind]['value']:.3f}" for kind in (*EASY_KINDS, "count")]
            lines.append([row.model, row.method, keep, f"{interval(*shares)}, n = {n}", *each])
    return markdown(("model", "method", "keep", "all but count [95 %]", *EASY_KINDS, "count"), lines)


def models(_: str) -> str:
    """Which method runs on which model; models with the same answers share a column."""
    answers: dict[tuple[str, str], dict[str, str]] = {}
    names = METHODS.own_names()
    for p in tokprune.list_support():
        answers.setdefault((p.model, p.tower), {})[p.method] = f"`{p.answer}`" if p.instead else p.answer
    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for (model, tower), cells in answers.items():
        column = alike.setdefault(tuple(cells[name] for name in names), {})
        column.setdefault(tower, []).append(f"`{model}`")
    heads = ["; ".join(f"{tower}: {', '.join(names)}" for tower, names in column.items()) for column in alike.values()]
    lines = [[f"`{name}`", *row] for name, *row in zip(names, *alike, strict=True)]
    return markdown(("method", *heads), lines)


def ledger(names: str) -> str:
    """What known models cost unpruned, and what is left at three ratios."""
    lines = []
    for name in names.split(","):
        shape = known_shape(name)
        crops = 5 if "next" in name else 1
        visual = crops * shape.n_visual
        full = shape.prefill(visual + REFERENCE_TEXT, crops=crops)
        left = []
        for ratio in (0.5, 0.25, 0.11):
            kept = shape.prefill(Budget(keep_ratio=ratio).n_keep(visual) + REFERENCE_TEXT, crops=crops)
            llm, whole = kept.llm.flops / full.llm.flops, kept.prefill.flops / full.prefill.flops
            left.append(f"{100 * llm:.1f} % / {100 * whole:.1f} %")
        tower = full.before_llm.flops / full.prefill.flops
        numbers = [
            f"{visual}",
            f"{full.llm.flops / 1e12:.2f} T",
            f"{100 * tower:.1f} %",
            f"{full.kv_bytes / 2**20:.0f} MiB",
        ]
        lines.append([f"`{name}`", *numbers, *left])
    head = ("shape", "visual tokens", "LLM FLOPs", "tower and projector, share of the prefill", "KV cache, 16 bit")
    return markdown((*head, *(f"left at keep {r}: LLM / prefill" for r in (0.5, 0.25, 0.11))), lines)


def savings(name: str) -> str:
    """What keeping a quarter saves on a known model: counted, and the time to the first token as measured."""
    shape, keep = known_shape(name), 0.25
    n = Budget(keep_ratio=keep).n_keep(shape.n_visual)
    before, after = (shape.prefill(count + REFERENCE_TEXT) for count in (shape.n_visual, n))
    amounts = (
        ("visual tokens", shape.n_visual, n, "", 1),
        ("columns of the language model", shape.n_visual + REFERENCE_TEXT, n + REFERENCE_TEXT, "", 1),
        ("LLM FLOPs of the prefill", before.llm.flops, after.llm.flops, " T", 1e12),
        ("FLOPs up to the first token", before.prefill.flops, after.prefill.flops, " T", 1e12),
        ("KV cache, 16 bit", before.kv_bytes, after.kv_bytes, " MiB", 2**20),
    )
    lines = [[what, f"{a / by:.3g}{unit}", f"{b / by:.3g}{unit}", times(b, a)] for what, a, b, unit, by in amounts]
    rows = [bench_tables.Row(**r) for r in read_rows(f"bench-{name}.jsonl")]
    bare, pruned = (next(r for r in rows if r.method == method) for method in ("none", "vtc_cls"))
    low, middle, high = pruned.first_token_ratio
    seconds = [f"{r.first_token_ms[1] / 1000:.2f} s" for r in (bare, pruned)]
    lines.append(["time to first token, measured", *seconds, f"x {middle:.2f} [{low:.2f}, {high:.2f}]"])
    return markdown(("", "all tokens", "a quarter", "ratio"), lines)


def predicted(shape: Shape, method: str, keep: float, n_text: int, bytes_per_value: int = 2) -> Report:
    """The report of one square picture and `n_text` text tokens, without running the model."""
    chosen, side = tokprune.get_method(method), round(shape.n_visual**0.5)
    vision, layout, budget = shape.vision, grid_layout(side, side), Budget(keep_ratio=keep)
    projects_rows = shape.projector[0] == vision.stack.width
    signals = chosen.needs(Tower(vision.stack.n_layers, vision.n_special > 0, projects_rows))
    cost, n = SelectionCost(shape, signals, chosen.cost), budget.n_keep(shape.n_visual)
    image = ImageReport(torch.arange(shape.n_visual) < n, layout, spent=lambda kept: cost.selector(layout, kept))
    return Report(
        method,
        f"keep_ratio={keep}",
        describe_signals(signals),
        shape.text.n_layers,
        images=[image],
        encoded=[image],
        prefills=[Prefill(1, shape.n_visual + n_text, n + n_text, 0, 0, None)],
        shape=shape,
        bytes_per_value=bytes_per_value,
    )


def report(name: str) -> str:
    """What `print(attachment.report)` shows for a known model, a line a part."""
    text = str(predicted(known_shape(name), "vtc_cls", 0.25, REFERENCE_TEXT)).replace("; ", "\n")
    return f"```text\n{text}\n```\n"


def details(_: str) -> str:
    """A section a method."""
    return method_pages.sections()


def families(which: str) -> str:
    """Model families, what they take, and where they can be cut; "short" leaves out towers and releases."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for family in all_families():
        towers = ", ".join(dict.fromkeys(kind.name for kind in family.towers.values()))
        takes = "pictures, videos" if "get_video_features" in family.encode_functions else "pictures"
        cuts = "no" if family.no_layer_cuts else "yes"
        facts = (takes, cuts) if which == "short" else (towers, takes, cuts, f"{family.oldest} to {NEWEST}")
        alike.setdefault(facts, []).append(f"`{family.model_type}`")
    lines = [[", ".join(dict.fromkeys(names)), *facts] for facts, names in alike.items()]
    if which == "short":
        return f"{markdown(('`model_type`', 'takes', 'cuts between layers'), lines)}\n{releases()}\n"
    return markdown(("`model_type`", "vision tower", "takes", "cuts between layers", "transformers"), lines)


def releases() -> str:
    """The oldest release of transformers that each family needs: most need the same one."""
    since: dict[str, list[str]] = {}
    for family in all_families():
        names = since.setdefault(family.oldest, [])
        if f"`{family.model_type}`" not in names:
            names.append(f"`{family.model_type}`")
    usual = max(since, key=lambda oldest: len(since[oldest]))
    others = [f"{', '.join(names)} from {oldest}" for oldest, names in since.items() if oldest != usual]
    return f"With transformers {usual} to {NEWEST}; {'; '.join(others)}."


def exits(name: str) -> str:
    """The layer where all visual tokens leave, what that saves and what it costs in answers."""
    rows = read_rows(name)
    first, lines = rows[0], []
    for r in rows:
        where = ", ".join(f"{layer}: {n}" for layer, n in r["exit_layers"].items() if n)
        bare = r["llm_flops_before"]
        lines.append(
            [
                f"`{r['method']}`" + (f", keep {r['keep_ratio']:.3f}" if r["keep_ratio"] is not None else ""),
                interval(r["value"], r["low"], r["high"]),
                times(r["llm_flops_after"], bare),
                times(r["llm_flops_ratio_as_run"], 1),
                f"{100 * r['selector_flops'] / bare:.2f} %",
                where,
            ]
        )
    head = (
        f"**{first['task']}**: {first['n_samples']} questions of the {first['split'] or 'whole'} split, "
        f"{first['model']}, {first['device']}, {first['dtype']}, {first['attn_implementation']}, transformers "
        f"{first['transformers']}, torch {first['torch']}, {first['date']}. Unpruned, one question costs "
        f"{first['llm_flops_before'] / 1e9:.3g} GFLOPs in the language model.\n\n"
    )
    batch = f"LLM FLOPs, batches of {first['batch_size']} as padded"
    columns = (
        "method",
        "accuracy [95 %]",
        "LLM FLOPs of a question",
        batch,
        "deciding, of the LLM",
        "exit before layer",
    )
    return head + markdown(columns, lines)


def selection_times(name: str) -> str:
    """Seconds to select by method and number of tokens, and the share of a prefill for methods about videos."""
    rows = [Timed(**r) for r in read_rows(name)]
    own = [r for r in rows if r.what == "selection"]
    sizes = sorted({r.n_visual for r in own})
    by = {(r.method, r.n_visual): shown_seconds(r) for r in own}
    lines = [[f"`{m}`", *(by.get((m, n), "") for n in sizes)] for m in sorted({r.method for r in own})]
    first = rows[0]
    machine = f"{first.device}, {first.threads} thread, torch {first.torch}, {first.date}."
    parts = [f"{machine}\n", markdown(("method", *(f"{n:,} tokens" for n in sizes)), lines)]
    for prefill in (r for r in rows if r.what == "prefill"):
        shares = [r for r in rows if r.what == "share" and r.n_visual == prefill.n_visual]
        shared = [[f"`{r.method}`", shown_seconds(r), shown_share(r, prefill)] for r in shares]
        head = ("method", f"{prefill.n_visual:,} tokens of 64 frames", f"of the prefill of `{prefill.method}`")
        whole = [f"prefill of `{prefill.method}`", shown_seconds(prefill), ""]
        parts.append("\n" + markdown(head, [*shared, whole]))
    return "\n".join(parts)


def ratios(names: str) -> str:
    """What pruning costs against what it cannot go below: before and now, with quartiles."""
    before, now = (bench_ratios.read(RESULTS / name) for name in names.split(","))
    parts = []
    for group, meaning in bench_ratios.MEANINGS.items():
        lines = [
            [f"`{r.of}`", r.to, *(bench_ratios.span_of(x) if x else "not measured" for x in (before.get(r.key), r))]
            for r in now.values()
            if r.group == group
        ]
        if not lines:
            continue
        command = f"python -m tokprune.eval.bench.ratios --groups {group}"
        heading = f"**{meaning[0].upper()}{meaning[1:]}** (`{command}`)"
        parts.append(f"{heading}\n\n" + markdown(("ratio of", "to", "before", "now"), lines))
    return "\n".join(parts)


def decode_steps(name: str) -> str:
    """Steps of decoding to a cache as short that was made by hand, and to the unpruned model, with quartiles."""
    lines = []
    for r in read_rows(name):
        to_hand, noise, to_bare = (bench_ratios.span(r[key]) if r[key] else "" for key in ("ratio", "noise", "to_bare"))
        ms = f"{r['us']['tokprune'] / 1000:.0f} ms"
        lines.append([f"`{r['method']}`", str(r["batch_size"]), ms, to_hand, noise, to_bare])
    header = ("method", "batch", "a step", "to a short cache by hand", "that cache to itself", "to unpruned")
    return markdown(header, lines)


def shown_seconds(row: Timed) -> str:
    """A time, or the limit that was met before there was one."""
    if row.seconds is not None:
        return f"{row.seconds:.2g} s" if row.seconds < 100 else f"{row.seconds:,.0f} s"
    return f"> {row.limit_s:g} s" if row.stopped == "time" else f"> {row.limit_gib:g} GiB"


def shown_share(row: Timed, prefill: Timed) -> str:
    """How much of a prefill a selection takes, where both were measured."""
    if row.seconds is None or prefill.seconds is None:
        return "not measured"
    return f"{100 * row.seconds / prefill.seconds:.2g} %"


BLOCKS: dict[str, Callable[[str], str]] = {
    "bench": bench,
    "comparison": comparison,
    "details": details,
    "frontier": frontier,
    "equality": equality,
    "exits": exits,
    "families": families,
    "gpu": lambda what: gpu_tables.tables(RESULTS, what),
    "grid": grid,
    "kinds": kinds,
    "ledger": ledger,
    "models": models,
    "pairs": pairs,
    "promises": promised.promises,
    "decode_steps": decode_steps,
    "ratios": ratios,
    "report": report,
    "reported": reported.tables,
    "savings": savings,
    "selection_times": selection_times,
    "serve": serve,
    "sources": lambda _: reported.sources(),
    "struck": lambda _: reported.struck(),
    "tuned": promised.tuned,
}


def rendered(text: str) -> str:
    """A text with its generated blocks, and the number of methods, filled in."""
    text = N_METHODS.sub(str(len(METHODS.own_names())), text)
    return BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]](match[3])}\n{match[4]}", text)


def main(pages: Annotated[list[Path] | None, typer.Argument(help="Markdown files.")] = None) -> None:
    """Rewrite the tables of files in place."""
    for page in pages or PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
