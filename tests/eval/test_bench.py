"""`tokprune bench`: what it counts is what ran, the baseline is the same model, and nothing measured is lost."""

from __future__ import annotations

import io
import json
import re
import signal
import threading
import weakref
from dataclasses import fields, replace

import pytest
import tiny
import torch
from commands import tokprune_cli
from PIL import Image
from rich.console import Console
from tokprune.eval.bench import cells, shaped, timing
from tokprune.eval.bench import sweep as bench
from tokprune.eval.bench import tables as bench_tables
from tokprune.eval.bench.cells import Row
from tokprune.eval.bench.sweep import Bench, Settings, configurations
from tokprune.eval.report import render
from tokprune.eval.run.rows import NONE, Config
from tokprune.eval.run.runner import Runner
from tokprune.eval.run.stopwatch import Memory
from tokprune.integrations.transformers import shape_from_config

import tokprune
from tokprune.core.clock import PARTS, Parts, listen, span
from tokprune.core.errors import RunError
from tokprune.cost import shapes
from tokprune.cost.flops import Shape, Stack, Vision
from tokprune.cost.shapes import KNOWN

# Before the language model, between its layers, both, merging, at a layer of one's choice, by content.
METHODS = ("vtc_cls", "fastv", "vtc_cls+fastv", "visionzip", "visual_exit:layer=2", "visual_exit", "prumerge")
SMALL = {"llava-1.5-small": 168, "llava-next-small": 336}


def small(name: str) -> Shape:
    """So narrow that its times mean nothing."""
    tower = Stack(4, 32, 48, 4, 4, 8, gated=False)
    return Shape(name, Vision(tower, 576, 1, 3 * 14 * 14), (32, 64, 64), 576, 576, Stack(5, 64, 96, 4, 2, 16), 300)


@pytest.fixture(scope="module", autouse=True)
def small_shapes():
    with pytest.MonkeyPatch.context() as patch:
        for name in SMALL:
            patch.setitem(shapes.KNOWN, name, small(name))
        yield


def quiet() -> Console:
    return Console(file=io.StringIO(), width=140, markup=False)


def settings(shape: str = "llava-1.5-small", **changed) -> Settings:
    usual = dict(methods=("uniform",), rounds=1, warmup=0, new_tokens=(3,), n_text=10)
    if not changed.get("model"):
        usual |= dict(shape=shape, resolutions=(SMALL.get(shape, 168),))
    return Settings(**{**usual, **changed})


@pytest.fixture(scope="module", params=SMALL)
def sweep(request, tmp_path_factory) -> tuple[list[Row], str]:
    """Rows of a sweep over batches and output lengths, and what its file holds."""
    out = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    asked = dict(methods=METHODS, keep=(0.5, 0.25), batch_sizes=(1, 2), new_tokens=(1, 4), rounds=2, warmup=1)
    return Bench(settings(request.param, **asked), out, quiet()).run(), out.read_text()


# ---- rows


@pytest.mark.slow
def test_every_cell_holds_every_configuration_and_the_bare_model(sweep):
    rows, _ = sweep
    expected = configurations(METHODS, (0.5, 0.25))
    assert len(expected) == 1 + 2 * 4 + 3  # exits and prumerge take no budget
    for size in (1, 2):
        for n_new in (1, 4):
            assert [r.config for r in rows if (r.batch_size, r.new_tokens) == (size, n_new)] == expected


def test_notes_call_random_what_was_random():
    """Stored rows: random weights; real weights on noise; and the latter as if on a picture of one's own."""
    rows = {}
    for name in ("bench-llava-1.5-7b", "bench-tiny-llava"):
        rows[name] = [
            Row(**line) for line in map(json.loads, (render.RESULTS / f"{name}.jsonl").read_text().splitlines())
        ]
    rows["own picture"] = [replace(row, picture="page.png, 756 x 1008 pixels") for row in rows["bench-tiny-llava"]]
    said = {name: " ".join(bench_tables.legend(found)) for name, found in rows.items()}
    assert "Weights are random" in said["bench-llava-1.5-7b"]
    assert "Pictures and text are random" in said["bench-tiny-llava"]
    assert "The text is random" in said["own picture"]
    assert "Pictures" not in said["own picture"]


def test_file_holds_the_rows_with_all_their_fields(sweep):
    rows, text = sweep
    read = [json.loads(line) for line in text.splitlines()]
    assert [Row(**r) for r in read] == rows
    for r in read:
        assert set(r) == {f.name for f in fields(Row)}
        for phase in cells.PHASES:
            assert sorted(r[f"{phase}_ms"]) == r[f"{phase}_ms"]
            assert len(r[f"{phase}_ms"]) == 3
        assert len(r["first_s"]) == len(r["token_s"]) == len(r["total_s"]) == r["rounds"] == 2
        assert r["warmup"] == 1


def test_kv_bytes_and_columns_are_those_of_the_ledger(sweep):
    """Exactly: what the cache holds behind the prompt, for the bare model and every method."""
    rows, _ = sweep
    for r in rows:
        shape = replace(small(r.model), name=r.model)
        assert r.kv_bytes == r.kv_bytes_ledger
        assert r.kv_bytes == shape.read(r.columns, rows=r.batch_size, bytes_per_value=4).kv_bytes
        assert len(r.columns) == 5
    bare = {(r.batch_size, r.new_tokens): r for r in rows if r.method == NONE}
    for r in rows:
        whole = bare[r.batch_size, r.new_tokens]
        assert r.kv_bytes_ratio == r.kv_bytes / whole.kv_bytes
        assert r.n_visual == whole.n_kept
        assert (r.kv_bytes < whole.kv_bytes) == (r.method not in (NONE, "visual_exit"))  # by content nothing leaves


def test_columns_follow_from_method_and_ratio(sweep):
    rows, _ = sweep
    if rows[0].model != "llava-1.5-small":
        return
    found = {(r.method, r.keep_ratio): r.columns for r in rows}
    assert found[NONE, None] == [154] * 5  # 12 x 12 patches and 10 words
    assert found["vtc_cls", 0.25] == [46] * 5
    assert found["visionzip", 0.5] == [82] * 5
    assert found["visual_exit:layer=2", None] == [154, 154, 10, 10, 10]
    assert found["fastv", 0.25][0] == 154
    assert found["fastv", 0.25][-1] == 46


def test_ratios_are_to_the_bare_model_of_the_same_round(sweep):
    rows, _ = sweep
    bare = {(r.batch_size, r.new_tokens): r for r in rows if r.method == NONE}
    for r in rows:
        other = bare[r.batch_size, r.new_tokens]
        each = [a / b for a, b in zip(r.total_s, other.total_s, strict=True)]
        assert (r.total_ratio[0], r.total_ratio[2]) == (min(each), max(each))
        assert (r.token_ratio is None) == (r.token_ms is None) == False  # noqa: E712 - four tokens were generated
        if r.method == NONE:
            assert r.total_ratio[1] == r.prefill_flops_ratio == r.kv_bytes_ratio == 1
        assert r.gains == r.losses == []  # two rounds show no difference
    one, four = (next(r for r in rows if r.new_tokens == n) for n in (1, 4))
    assert one.total_s == one.first_s  # the same run, read at its first token
    assert all(a < b for a, b in zip(one.total_s, four.total_s, strict=True))
    assert (one.token_flops_ratio, four.token_flops_ratio) == (None, 1.0)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SMALL)
def test_the_baseline_runs_the_attention_of_the_methods(attn, shape, tmp_path):
    rows = Bench(settings(shape, attn=attn, methods=("uniform", "fastv")), tmp_path / "x.jsonl", quiet()).run()
    assert {r.attn_implementation for r in rows} == {attn}
    assert {r.dtype for r in rows} == {"float32"}
    assert len(rows) == 3


def test_another_attention_of_the_baseline_would_be_seen():
    """What a row says is read while it runs."""
    model = shaped.endless(tiny.fresh_model())
    inputs = tiny.batch(((0,),))
    assert timing.measured(model, inputs, Config(NONE), 1).attn == "sdpa"
    model.set_attn_implementation("eager")
    assert timing.measured(model, inputs, Config("uniform", 0.5), 1).attn == "eager"


def test_a_prediction_is_missing_where_the_cost_of_a_model_is_not_known(tmp_path, monkeypatch):
    monkeypatch.delitem(shapes.VISION_FAMILIES, "clip_vision_model")
    (bare, pruned) = Bench(settings("", model="tiny-llava"), tmp_path / "x.jsonl", quiet()).run()
    assert bare.kv_bytes_ledger is pruned.prefill_flops_ratio is pruned.token_flops_ratio is None
    assert pruned.kv_bytes < bare.kv_bytes
    list(bench_tables.tables([bare, pruned]))


# ---- one generation


@pytest.mark.parametrize("kind", ["clip", "llava_next", "llava_onevision", "internvl"])
@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (NONE, set()),
        ("uniform@0.25", {"select", "shorten"}),
        ("fopru@0.25", {"signals", "select", "shorten"}),
        ("cdpruner@0.25", {"select", "shorten"}),
        ("visionzip@0.25", {"select", "shorten"}),
        ("fastv@0.25", {"cut"}),
        ("visual_exit:layer=2", {"cut"}),
        ("uniform+fastv@0.25", {"select", "shorten", "cut"}),
    ],
)
def test_phases_are_heard_and_add_up(kind, method, parts):
    name, _, keep = method.partition("@")
    model, config = shaped.endless(tiny.fresh_model(kind)), Config(name, float(keep) if keep else None)
    inputs = tiny.batch(((0,), (1,)), kind=kind)
    long, short = (timing.measured(model, inputs, config, n) for n in (5, 1))
    phases = long.phases
    assert parts <= {p for p in PARTS if phases.counts.get(p)}
    assert phases.counts["vision"] == 1
    assert phases.counts["prefill"] == 2  # decoder layers and LM head
    assert phases.counts == short.phases.counts  # steps of decoding are not in it
    assert phases.vision_s > 0
    assert phases.prefill_s > 0
    assert (phases.selection_s > 0) == bool(parts)
    whole = phases.vision_s + phases.selection_s + phases.prefill_s + phases.rest_s
    assert whole == pytest.approx(phases.first_s)
    assert phases.rest_s > 0  # nothing is counted twice
    assert phases.first_s == long.ticks[0]
    assert "get_image_features" not in vars(model.model)  # nothing is left behind
    assert not model._forward_hooks
    assert long.cache == short.cache


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("fopru@0.25", {"signals": 2, "select": 2, "shorten": 2}),  # a layer and its end; packing and choosing
        ("cdpruner@0.25", {"signals": 1, "select": 4, "shorten": 2}),  # places and text, too
        ("fastv@0.25", {"select": 2 + 1, "shorten": 2, "cut": 2 + 4}),  # at both ends, and in layers from the first cut
    ],
)
def test_no_part_of_the_selection_is_missed(method, expected):
    name, _, keep = method.partition("@")
    model, inputs = shaped.endless(tiny.fresh_model()), tiny.batch(((0,), (1,)))
    run = timing.measured(model, inputs, Config(name, float(keep)), 1)
    assert {p: n for p, n in run.phases.counts.items() if p in PARTS} == expected


def test_a_run_without_phases_measures_the_same_cache():
    model, inputs = shaped.endless(tiny.fresh_model()), tiny.batch(((0,),))
    heard, unheard = (timing._once(model, inputs, Config("fastv", 0.5), 3, phases=p) for p in (True, False))
    assert unheard.phases.seconds == {}
    assert unheard.cache == heard.cache
    assert len(unheard.ticks) == 3


@pytest.mark.parametrize("n_new", [1, 2, 7])
@pytest.mark.parametrize("method", [NONE, "vtc_cls", "fastv"])
def test_every_token_that_was_asked_for_is_generated(method, n_new):
    """Also where every token would end the answer."""
    model, inputs = tiny.fresh_model(), tiny.batch(((0,), (1,)))
    model.generation_config.eos_token_id = list(range(tiny.VOCAB))
    config = Config(method, None if method == NONE else 0.5)
    assert timing.measured(model, inputs, config, n_new).n_new == 1
    run = timing.measured(shaped.endless(model), inputs, config, n_new)
    assert run.n_new == len(run.ticks) == n_new
    assert run.ticks == sorted(run.ticks)
    assert run.until(n_new) == run.total_s >= run.ticks[-1]
    assert (run.token_s is None) == (n_new == 1)


def test_warm_up_is_not_counted_and_every_round_begins_elsewhere():
    model = shaped.endless(tiny.fresh_model())
    subject = cells.Subject(model.config, tiny.SIDE, shaped.image_processor_of(model.config), tiny.N_VISUAL, model)
    configs, order = configurations(("uniform", "pool"), (0.5,)), []
    asked = replace(settings(), warmup=2, rounds=3, new_tokens=(1,))
    cell = cells.Cell(asked, subject, 1, configs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "measured", lambda m, i, c, n: order.append(c) or timing.measured(m, i, c, n))
        cell.measure()
    assert len(order) == 15
    assert order[::3] == [configs[i % 3] for i in range(5)]
    assert all(set(order[i : i + 3]) == set(configs) for i in range(0, 15, 3))
    assert len(cell.rounds) == 3
    assert {r.rounds for r in cell.rows()} == {3}


# ---- parts


def test_a_part_inside_another_is_taken_off_it():
    clock = iter([0, 1, 3, 6, 10, 15])
    parts = Parts(lambda: next(clock))
    parts.begin("outer")  # 0
    parts.begin("inner")  # 1
    parts.end()  # 3
    parts.begin("inner")  # 6
    parts.end()  # 10
    parts.end()  # 15
    assert parts.seconds == {"outer": 1 + 3 + 5, "inner": 2 + 4}
    assert parts.counts == {"outer": 1, "inner": 2}


def test_only_who_listens_in_this_thread_hears():
    @span("select")
    def work() -> int:
        return 7

    with listen() as outer:
        with listen() as inner:
            assert work() == 7
        other = threading.Thread(target=work)
        other.start()
        other.join()
    work()
    assert (dict(outer.counts), dict(inner.counts)) == ({}, {"select": 1})
    with listen() as parts, pytest.raises(ZeroDivisionError), span("select"):
        1 / 0  # noqa: B018
    assert not parts._open


def test_memory_of_a_block():
    with Memory(torch.device("cpu")) as memory:
        torch.ones(2**24).sum()
    if memory.peak_bytes is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 60 * 2**20 < memory.above_bytes < memory.peak_bytes
    with Memory(torch.device("cpu")) as again:
        pass
    assert again.above_bytes < 60 * 2**20  # the peak of before is forgotten


def test_memory_of_a_run_does_not_depend_on_runs_before_it():
    """What a run before has freed counts again; the bare cache alone is 1.5 MiB."""
    model = shaped.endless(Runner.load("tiny-llava").model)
    config, side = model.config, shaped.crop_side(model.config)
    processor = shaped.image_processor_of(config)
    n = shaped.placeholders(model, shaped.encoded(processor, shaped.pictures(side, 1)))
    subject = cells.Subject(config, side, processor, n, model)
    inputs = cells.Cell(settings("", model="tiny-llava", n_text=64), subject, 1, []).inputs()
    runs = [timing.measured(model, inputs, Config(NONE), 2) for _ in range(4)]
    if runs[0].above_bytes is None:
        pytest.skip("this system does not tell the peak of a process")
    for run in runs[1:]:
        assert run.above_bytes > run.cache.n_bytes > 2**20


# ---- shapes and prompts


@pytest.mark.parametrize("name", [n for n in KNOWN if shaped.build_of(n)])
def test_built_configurations_have_the_ledger_of_the_known_shape(name):
    known = KNOWN[name]
    assert replace(shape_from_config(shaped.config_of(name)), name=name) == known
    scaled = replace(shape_from_config(shaped.config_of(name, 4, 3)), name=name)
    n_windowed = min(known.vision.stack.n_windowed, 2)  # one of three layers attends to the whole picture
    tower = replace(known.vision, stack=replace(known.vision.stack, n_layers=3, n_windowed=n_windowed))
    assert scaled == replace(known, text=replace(known.text, n_layers=4), vision=tower)


def test_skeleton_has_the_parameters_of_the_real_model():
    model = shaped.skeleton(shaped.config_of("llava-1.5-7b"), torch.bfloat16, "sdpa")
    assert sum(p.numel() for p in model.parameters()) == 7_063_427_072  # as on the hub
    assert model.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "sides", "expected"),
    [
        ("llava-1.5-7b", (168, 336), (144, 576)),
        ("llava-next-7b", (336, 672), (2 * 576 + 24, 5 * 576 + 48)),  # beside newlines
        ("internvl3-1b", (448, 896), (256, 5 * 256)),
        ("qwen2.5-vl-7b", (448, 672), (16 * 16, 24 * 24)),
        ("qwen3-vl-2b", (448, 672), (14 * 14, 21 * 21)),
    ],
)
def test_resolution_makes_patches_or_crops(name, sides, expected):
    for side, n in zip(sides, expected, strict=True):
        config = shaped.config_of(name, 2, 3, side if name == "llava-1.5-7b" else None)
        model = shaped.skeleton(config, torch.float32, "sdpa")
        assert (
            shaped.placeholders(model, shaped.encoded(shaped.image_processor_of(config), shaped.pictures(side, 1))) == n
        )


@pytest.mark.parametrize("name", ["llava-1.5-small", "llava-next-small"])
def test_rows_of_a_batch_differ_and_text_holds_no_placeholder(name):
    config = shaped.config_of(name)
    pixels = shaped.encoded(shaped.image_processor_of(config), shaped.pictures(168, 3))
    many = shaped.prompt(config, 20, 3000, pixels, 3)["input_ids"]
    assert (many == config.image_token_id).sum(1).tolist() == [20] * 3
    made = shaped.prompt(config, 20, 9, pixels, 3)
    ids, images = made["input_ids"], made["pixel_values"]
    assert ids.shape == (3, 29)
    assert (ids == config.image_token_id).sum(1).tolist() == [20] * 3
    assert len({tuple(row.tolist()) for row in ids}) == 3
    assert not torch.equal(images[0], images[1])
    assert ids[:, :5].max() < 299
    assert (ids[:, -1] != config.image_token_id).all()


# ---- what is refused, and what is not lost


def test_a_model_too_large_is_refused_before_it_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(shaped, "free_bytes", lambda device: 4 * 2**30)
    monkeypatch.setattr(shaped, "build", lambda *ignored: pytest.fail("built"))
    out = tmp_path / "rows.jsonl"
    out.write_text("kept\n")
    with pytest.raises(RunError) as error:
        bench.run(settings("llava-1.5-7b", dtype="bfloat16"), out, True, quiet())
    said = str(error.value)
    assert "llava-1.5-7b needs 13." in said
    assert "(13.2 of weights in bfloat16" in said
    assert "4.0 GiB are free on cpu; type fewer decoder layers (--layers 4), --dtype bfloat16" in said
    assert out.read_text() == "kept\n"  # nothing goes before it is known that something comes
    config = shaped.config_of("llava-1.5-7b", 4)
    eager = [shaped.skeleton(config, torch.float32, attn) for attn in ("sdpa", "eager")]
    monkeypatch.setattr(shaped, "free_bytes", lambda device: 9 * 2**30)
    shaped.refuse_too_large(eager[0], torch.device("cpu"), 1, 640, "x")
    with pytest.raises(RunError, match="x needs"):  # attention maps of a large batch
        shaped.refuse_too_large(eager[1], torch.device("cpu"), 16, 3000, "x")


BAD = {
    "": "give a shape or a model",
    "--shape llava-1.5-7b --model tiny-llava": "give a shape or a model",
    "--shape llava-1.5-8b": "Did you mean 'llava-1.5-7b'?",
    "--shape gemma3-4b": "; type one of: ",
    "--shape llava-1.5-7b --layers 99": "outside 2 to 32",
    "--shape llava-1.5-7b --layers 2 --vision-layers 2": "--vision-layers 2 is outside 3 to 24",
    "--shape llava-1.5-7b --layers 2 --resolution 100": "a multiple of 14",
    "--shape llava-1.5-7b --layers 2 --attn flash_attention_2": "--attn flash_attention_2:",
    "--shape onevision-0.5b --layers 2 --methods vtc_cls": "no [CLS] token",
    "--model tiny-llava --layers 2": "leave them out with --model",
    "--model tiny-llava --resolution 200": "--resolution has no effect",
    "--model tiny-qwen --picture README.md": "name a PNG or JPEG file",
    "--model tiny-qwen --picture docs/scene.png --batch-size 2": "leave --resolution and --batch-size out",
    "--model tiny-llava --attn flash_attention_2": "Type --attn sdpa",
    "--model tiny-lava": "Did you mean 'tiny-llava'?",
    "--model tiny-llava --dtype int4": "float32, bfloat16, float16",
    "--model tiny-llava --device toaster": "type cpu or cuda",
    "--model tiny-llava --device meta": "type --device cpu",
    "--model tiny-llava --batch-size x": "use --batch-size 1,8",
    "--model tiny-llava --batch-size 0": "at least 1",
    "--model tiny-llava --new-tokens 1,0": "at least 1",
    "--model tiny-llava --rounds 0": "at least 1",
    "--model tiny-llava --warmup -1": "--warmup at least 0",
    "--model tiny-llava --text 1": "--text takes at least 2",
    "--model tiny-llava --keep 2": "not a fraction",
    "--model tiny-llava --keep a": "use --keep 0.5,0.25",
    "--model tiny-llava --methods none": "nothing to compare",
    "--model tiny-llava --methods vtc_clx": "Did you mean 'vtc_cls'?",
    "--model tiny-llava --out /proc/none/rows.jsonl": "cannot write",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_options_are_one_line(line, tmp_path):
    out = [] if "--out" in line else ["--out", str(tmp_path / "rows.jsonl")]
    done = tokprune_cli("bench", *line.split(), *out)
    assert done.returncode == 2
    assert BAD[line] in done.stderr
    assert len([x for x in done.stderr.splitlines() if x.startswith("tokprune:")]) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_of_an_earlier_run_stay(tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text("earlier\n")
    with pytest.raises(RunError, match="holds rows of an earlier run"):
        bench.run(settings(), out, False, quiet())
    assert out.read_text() == "earlier\n"
    assert bench.run(settings(), out, True, quiet())
    assert len(out.read_text().splitlines()) == 2


def interrupted_at(monkeypatch, call: int, raised) -> None:
    """Something happens in the middle of the so-many-th run."""
    calls = []

    def measured(*arguments):
        calls.append(1)
        if len(calls) == call:
            raised()
        return timing.measured(*arguments)

    monkeypatch.setattr(cells, "measured", measured)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("call", "n_rows"), [(1, 0), (4, 2), (8, 4)])
def test_interrupted_keeps_whole_rounds(call, n_rows, tmp_path, monkeypatch):
    """Two batches of three rounds of two runs: in the first run, in the second round, and in the next batch."""
    interrupted_at(monkeypatch, call, lambda: signal.raise_signal(signal.SIGINT))
    out = tmp_path / "rows.jsonl"
    done = tokprune_cli(
        *("bench", "--model", "tiny-llava", "--methods", "uniform", "--batch-size", "1,2", "--new-tokens", "2"),
        *("--rounds", "2", "--warmup", "1" if call == 8 else "0", "--out", str(out)),
    )
    assert done.returncode == 130
    assert len(out.read_text().splitlines()) == n_rows - (call == 8) * 2
    assert f"Interrupted: {n_rows - (call == 8) * 2} rows of whole rounds are in" in done.stdout


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_is_one_line_and_keeps_what_was_measured(tmp_path, monkeypatch):
    interrupted_at(monkeypatch, 3, out_of_memory)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(RunError, match="out of memory at batch size 2; type fewer decoder layers"):
        Bench(settings(batch_sizes=(1, 2)), out, quiet()).run()
    assert len(out.read_text().splitlines()) == 2


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("shapes do not match")

    interrupted_at(monkeypatch, 1, broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Bench(settings(), tmp_path / "rows.jsonl", quiet()).run()


def test_a_full_disk_is_one_line():
    done = tokprune_cli("bench", "--model", "tiny-llava", "--methods", "uniform", "--rounds", "1", "--out", "/dev/full")
    assert done.returncode == 2
    assert "cannot write /dev/full: No space left on device" in done.stderr


def test_one_model_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """A tower of another size is another model; the one before is gone when it is built."""
    built, build = [], shaped.build

    def watched(*arguments):
        assert not any(model() for model in built)
        model = build(*arguments)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(shaped, "build", watched)
    rows = Bench(settings(resolutions=(84, 168)), tmp_path / "x.jsonl", quiet()).run()
    assert len(built) == 2
    assert [(r.resolution, r.n_visual) for r in rows if r.method == NONE] == [(84, 36), (168, 144)]
    found = bench_tables.matrix(rows)
    assert {name.partition("\n")[0] for name in found.header[2:]} == {"84 pixels", "168 pixels"}
    assert [line[:2] for line in found.lines] == [["none", ""], ["uniform", "0.25"]]
    cells = [dict(zip(found.header, line, strict=True)) for line in found.lines]
    assert [c["84 pixels\nvisual\ntokens"] for c in cells] == ["36 -> 36", "36 -> 9"]
    assert [c["168 pixels\nvisual\ntokens"] for c in cells] == ["144 -> 144", "144 -> 36"]
    built.clear()
    rows = Bench(settings("llava-next-small", resolutions=(336, 672)), tmp_path / "y.jsonl", quiet()).run()
    assert len(built) == 1  # more crops, the same model
    assert [r.n_visual for r in rows if r.method == NONE] == [2 * 576, 5 * 576]


def test_usual_methods_that_a_model_cannot_run_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.KNOWN, "onevision-small", replace(small("onevision-small"), projector=(32, 64, 64)))
    console = quiet()
    asked = replace(settings("onevision-small", methods=()), resolutions=(384,))
    rows = Bench(asked, tmp_path / "rows.jsonl", console).run()
    assert [r.method for r in rows] == [NONE, "uniform", "divprune", "fastv"]
    assert "cannot run them: vtc_cls" in console.file.getvalue()


# ---- what people read


def test_a_page_of_ones_own_loses_its_margins_before_the_tower(tmp_path):
    page = Image.new("RGB", (224, 168), "white")
    page.paste(Image.effect_noise((56, 56), 90), (56, 56))
    page.save(tmp_path / "page.png")
    asked = settings("", model="tiny-qwen", picture=tmp_path / "page.png", methods=("pixelprune",))
    bare, pruned = Bench(asked, tmp_path / "x.jsonl", quiet()).run()
    assert bare.picture == "page.png, 224 x 168 pixels"
    assert pruned.prefill_flops_ratio < 0.6
    assert pruned.n_kept < bare.n_kept


def test_terminal_shows_tables_verdicts_and_conditions(tmp_path):
    done = tokprune_cli(
        *("bench", "--model", "tiny-llava", "--methods", "vtc_cls,visual_exit:layer=2", "--batch-size", "1,2"),
        *("--new-tokens", "1,3", "--rounds", "2", "--text", "20", "--out", str(tmp_path / "rows.jsonl")),
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    for text in ("vision", "selection", "prefill", "later tokens", "gains", "slower", "KV", "[50 % interval]"):
        assert text in shown
    assert "tiny-llava (real weights, 8 decoder and 5 vision layers), x86_64 cpu" in shown
    assert len(re.findall(r"^vtc_cls +0.25 ", shown, re.MULTILINE)) == 1 + 2  # the matrix, and a table a batch size
    assert "Relative to the unpruned model" in shown
    assert "see noise" in shown
    assert "12 rows are in" in shown


def test_tables_fit_a_terminal_of_140_columns(sweep):
    rows, _ = sweep
    console = quiet()
    longer = [replace(r, new_tokens=n) for r in rows if r.new_tokens == 4 for n in (1, 16, 128)]
    for table in (*bench_tables.tables(rows), *bench_tables.tables(longer)):
        console.print(table.grid())
    shown = console.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 140
    assert "visual_exit:layer=2" in shown


def slower(row: Row, factor: float) -> Row:
    """A row of six rounds, which another time's are that many times."""
    gains, losses = ([[1, None]] if side else [] for side in (factor < 1, factor > 1))
    return replace(row, total_ratio=[factor] * 3, rounds=6, gains=gains, losses=losses)


def cells_of(rows, title: str) -> list[dict[str, str]]:
    """Lines of tables with this in their titles, by column."""
    found = [t for t in bench_tables.tables(rows) if title in t.title]
    return [dict(zip(t.header, line, strict=True)) for t in found for line in t.lines]


def test_gains_and_losses_are_columns(sweep):
    rows, _ = sweep
    lost = [slower(r, 1.0 if r.method == NONE else 1.2) for r in rows]
    at = {batch: [f"batch {batch}\n{what}\nat" for what in ("gains", "slower")] for batch in (1, 2)}
    for names in at.values():
        said = {line["method"]: tuple(line[name] for name in names) for line in cells_of(lost, "Relative")}
        assert said.pop("none") == ("-", "-")
        assert set(said.values()) == {("-", "1+")}
    assert "No configuration gains time." in list(bench_tables.legend(lost))
    some = [replace(r, gains=[[1, 3], [8, 8], [52, None]], losses=[]) if r.method == "vtc_cls" else r for r in lost]
    said = {line["method"]: line[at[2][0]] for line in cells_of(some, "Relative")}
    assert said["vtc_cls"] == "1-3, 8, 52+"
    assert "No configuration gains time." not in list(bench_tables.legend(some))
    won = [r if r.method == NONE or r.batch_size == 1 else slower(r, 0.8) for r in lost]
    line = cells_of(won, "Relative")[1]
    assert (line["batch 1\ntotal,\n4 tokens"], line["batch 2\ntotal,\n4 tokens"]) == ("1.20", "0.80")


def test_the_matrix_has_every_figure_once(sweep):
    """A line for each configuration; of every batch its own columns, and predictions once."""
    rows, _ = sweep
    found = bench_tables.matrix(rows)
    assert [tuple(line[:2]) for line in found.lines] == [
        (c.method, "" if c.keep_ratio is None else f"{c.keep_ratio:g}") for c in configurations(METHODS, (0.5, 0.25))
    ]
    assert len(set(found.header)) == len(found.header)
    assert [name for name in found.header if "batch" not in name] == [
        *("method", "keep", "visual\ntokens", "prefill\nFLOPs", "later\nFLOPs", "KV")
    ]
    line = found.lines[1]
    cells = dict(zip(found.header, line, strict=True))
    for batch in (1, 2):
        (own,) = [r for r in rows if (r.name, r.batch_size, r.new_tokens) == (f"{line[0]} {line[1]}", batch, 4)]
        assert cells[f"batch {batch}\ntotal,\n4 tokens"].removesuffix(" ~") == f"{own.total_ratio[1]:.2f}"
        assert cells[f"batch {batch}\nfirst\ntoken"].removesuffix(" ~") == f"{own.first_token_ratio[1]:.2f}"
        assert cells[f"batch {batch}\nKV\nMiB"] == f"{own.kv_bytes / 2**20:.1f}"
        assert f"batch {batch}\ntotal,\n1 tokens" not in cells  # it is the first token


def test_few_rounds_are_marked_as_noise(sweep):
    rows, _ = sweep
    *_, last = bench_tables.legend(rows)  # of two rounds
    assert "--rounds 6" in last
    for line in cells_of(rows, "Relative"):
        assert line["batch 1\nfirst\ntoken"].endswith("~") == (line["method"] != NONE)
    enough = [slower(r, 0.5) for r in rows]
    assert not any(line["batch 1\ntotal,\n4 tokens"].endswith("~") for line in cells_of(enough, "Relative"))


def test_a_run_of_one_token(tmp_path):
    rows = Bench(settings(new_tokens=(1,), rounds=6), tmp_path / "x.jsonl", quiet()).run()
    assert rows[1].token_ms is rows[1].token_ratio is None
    assert all(r in ([], [[1, None]]) for r in (rows[1].gains, rows[1].losses))
    for line in cells_of(rows, "milliseconds"):
        assert line["later tokens,\neach"] == ""


def test_block_of_the_readme_is_rendered_from_a_file(sweep, tmp_path, monkeypatch):
    rows, text = sweep
    (tmp_path / "bench.jsonl").write_text(text)
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    block = render.BLOCKS["bench"]("bench.jsonl")
    assert bench_tables.conditions_line(rows[0]) in block
    assert len(re.findall(r"\| method +\|", block)) == 1 + 2  # the matrix, and a table a batch size
    assert len(re.findall(r"\| `vtc_cls` +\| 0.25 +\|", block)) == 1 + 2
    for table in block.split("**")[2::2]:
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) == 1
    assert block.endswith(" ".join(bench_tables.legend(rows)) + "\n")


def test_attach_is_not_part_of_what_is_timed():
    """It is paid once, not with every picture."""
    assert tokprune.get_method("vtc_cls").takes_budget
    model, inputs = shaped.endless(tiny.fresh_model()), tiny.batch(((0,),))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.Stopwatch, "__enter__", lambda self: seen.append(_hooks(model)) or _entered(self))
        timing.measured(model, inputs, Config("vtc_cls", 0.5), 1)
    assert seen[0] > 0


_entered = timing.Stopwatch.__enter__


def _hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) for m in model.modules())
