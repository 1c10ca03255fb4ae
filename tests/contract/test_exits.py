"""Exits of all visual tokens: the rows that leave, what is computed then, gate files, and fitting."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle

import oracle
import pytest
import tiny
import torch
from commands import tokprune_cli
from contract.test_adapters import KINDS, by_row, model_and_batch
from contract.test_cuts import ENCODES_ONCE
from safetensors.torch import save_file
from tokprune.eval.run.rows import Config
from tokprune.eval.run.runner import Runner
from tokprune.eval.search import fit_exit
from tokprune.eval.search.exits import Exits, columns_by_layer
from tokprune.eval.tasks.findit import FindIt

import tokprune
from tokprune.core.errors import BudgetError, OptionError
from tokprune.core.layout import grid_layout
from tokprune.core.signals import Decoder, Kind, Signal
from tokprune.core.tokens import VisualTokens
from tokprune.methods.gates import Gates, gate_features, read_gates, write_gates

DEPTH, WIDTH = 5, 64
kinds = pytest.mark.parametrize("kind", KINDS)
INDEX = {"one": 0, "two": 1}  # rows of tiny.MIXED with pictures


def decoder_of(model) -> Decoder:
    with tokprune.attach(model, "visual_exit:layer=1") as attachment:
        return attachment._family.decoder


@torch.no_grad()
def features_at(model, single, layer):
    """What a gate reads at the input of a layer, by hand, from the bare model's states."""
    states = {}

    def note(module, args, kwargs):
        states["x"] = args[0] if args else kwargs["hidden_states"]

    hook = model.model.language_model.layers[layer].register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**single)
    finally:
        hook.remove()
    ids = single["input_ids"][0]
    after = int((ids == tiny.IMAGE).nonzero().max())
    text = states["x"][0, after + 1 :].float()
    return torch.cat([text[:-1].mean(0), text[-1]])


def gate_file(path, model, kind="clip", leave=None, layers=(0, 1, 2, 3)):
    """Gates written by hand: at the output of layer l those rows leave that `leave[l]` names, and no others do.

    A gate with one hidden unit fires where the last token's state points along that of the rows that are to leave, and
    against those of the others.
    """
    inputs = tiny.batch(dtype=torch.float64, kind=kind)
    hidden, weights = 4, {}
    for layer in layers:
        found = {n: features_at(model, tiny.row(inputs, r, kind=kind), layer + 1) for n, r in INDEX.items()}
        first, last = torch.zeros(hidden, 2 * WIDTH), torch.zeros(2, hidden)
        names = (leave or {}).get(layer, ())
        signs = torch.tensor([1.0 if n in names else -1.0 for n in found])
        rows = torch.stack(list(found.values()))
        first[0] = 5 * torch.linalg.pinv(rows) @ signs  # +5 for rows that leave, -5 for the others
        first[1] = -first[0]
        last[1, 0], last[0, 1] = 1, 1
        weights[layer] = (first, last)
    write_gates(path, Gates(decoder_of(model), weights))
    return f"dyvte:gate={path}"


def gone(single, layer):
    """Every visual column from a layer on; nothing for None."""
    return {} if layer is None else {layer: single["input_ids"][0] == tiny.IMAGE}


def exits_of(attachment):
    """The layer at which each row's pictures left."""
    return [{min(image, default=None) for image in row} for row in by_row(attachment.kept)]


# ---- dyvte


@kinds
@torch.no_grad()
def test_hand_made_gates_let_one_row_leave_and_the_other_stay(kind, tmp_path):
    model, inputs = model_and_batch(kind)
    for leaves, layers in (({1: ("one",)}, {"one": 2}), ({1: ("two",), 3: ("one",)}, {"two": 2, "one": 4})):
        spec = gate_file(tmp_path / "gate.safetensors", model, kind, leaves)
        with tokprune.attach(model, spec) as attachment:
            logits = model(**inputs).logits
            assert exits_of(attachment)[:2] == [{layers.get("one")}, {layers.get("two")}]
            kept = attachment.kept
            assert all(not len(index) for image in kept for index in image.values())
            for r in range(3):
                single = tiny.row(inputs, r, kind=kind)
                padding = inputs["input_ids"].shape[1] - single["input_ids"].shape[1]
                left = gone(single, layers.get(dict(enumerate(INDEX)).get(r)))
                with attachment.paused():
                    want = oracle.masked_logits(model, oracle.full_embeds(model, single), left, padding)
                alive = ~left[min(left)] if left else torch.ones_like(single["input_ids"][0]).bool()
                assert (logits[r, padding:][alive] - want[0, alive]).abs().max() < 1e-9
                alone = model(**single).logits  # without padding, rotary angles are rounded otherwise
                assert (logits[r, padding:][alive] - alone[0, alive]).abs().max() < 1e-4


@kinds
@torch.no_grad()
def test_cached_generation_behind_ragged_exits_equals_recomputing(kind, tmp_path):
    model, inputs = model_and_batch(kind)
    spec = gate_file(tmp_path / "gate.safetensors", model, kind, {1: ("two",), 3: ("one",)})
    with tokprune.attach(model, spec) as attachment:
        tokens, kept = tiny.generate(model, inputs), by_row(attachment.kept)
        if ENCODES_ONCE:
            assert torch.equal(tokens, tiny.generate(model, inputs, use_cache=False))
        for r in range(3):
            assert torch.equal(tokens[r : r + 1], tiny.generate(model, tiny.row(inputs, r, kind=kind)))
    assert [{min(i, default=None) for i in row} for row in kept[:2]] == [{4}, {2}]
    for r, layer in ((0, 4), (1, 2)):
        single = tiny.row(inputs, r, kind=kind)
        embeds = oracle.full_embeds(model, single)
        assert tokens[r].tolist() == oracle.masked_greedy(model, embeds, gone(single, layer))


@torch.no_grad()
def test_beams_and_a_method_before_the_language_model(tmp_path):
    model, inputs = model_and_batch("clip", layout=((0,), (1,)))
    decoder = decoder_of(model)
    first, last = torch.zeros(1, 2 * WIDTH), torch.zeros(2, 1)
    write_gates(tmp_path / "never", Gates(decoder, {1: (first, last)}))  # equal logits: nobody leaves
    before = tiny.generate(model, inputs, num_beams=3)
    with tokprune.attach(model, f"dyvte:gate={tmp_path / 'never'}") as attachment:
        assert torch.equal(tiny.generate(model, inputs, num_beams=3), before)
        assert exits_of_all(attachment) == [None, None]
    with tokprune.attach(model, "vtc_cls+visual_exit:layer=3", keep_ratio=0.25) as attachment:
        cached = tiny.generate(model, inputs, num_beams=3)
        assert torch.equal(cached, tiny.generate(model, inputs, num_beams=3, use_cache=False))
        assert all(i.n_by_layer(DEPTH) == [9, 9, 9, 0, 0] for i in attachment.report.images)


def exits_of_all(attachment):
    return [min(image, default=None) for image in attachment.kept]


@torch.no_grad()
def test_a_gate_reads_the_text_behind_the_last_image_and_the_last_token(tmp_path, monkeypatch):
    model, inputs = model_and_batch("clip")
    spec = gate_file(tmp_path / "gate.safetensors", model)
    seen = []
    logits = Gates.logits
    monkeypatch.setattr(Gates, "logits", lambda self, layer, x: seen.append((layer, x)) or logits(self, layer, x))
    for r in (0, 1):
        single, found = tiny.row(inputs, r), []
        found = [features_at(model, single, layer + 1) for layer in range(4)]
        with tokprune.attach(model, spec):
            seen.clear()
            model(**single)
        assert [layer for layer, _ in seen] == [0, 1, 2, 3]
        for (_, x), want in zip(seen, found, strict=True):
            assert x.dtype == torch.float32
            assert (x - want).abs().max() < 1e-6


def test_one_token_behind_the_image_is_its_own_mean():
    x = torch.randn(2, 1, 3)
    assert torch.equal(gate_features(x), torch.cat([x[:, 0], x[:, 0]], 1))
    x = torch.tensor([[[1.0], [3.0], [10.0]]])
    assert gate_features(x).tolist() == [[2.0, 10.0]]


def test_dyvte_without_a_gate_is_listed_and_says_what_to_type():
    assert str(tokprune.get_method("dyvte")) == "DyVTE()"
    with pytest.raises(OptionError, match="tokprune fit-exit"):
        tokprune.attach(tiny.model(), "dyvte")


def test_dyvte_is_read_once_and_is_copied_and_pickled(tmp_path):
    spec = gate_file(tmp_path / "gate.safetensors", tiny.model(dtype=torch.float64))
    method = tokprune.get_method(spec)
    first = method.gates
    os.remove(tmp_path / "gate.safetensors")
    assert method.gates is first
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other == method
        assert other.gates.layers == (0, 1, 2, 3)


def test_the_cost_of_gates_is_reported(tmp_path):
    model, inputs = model_and_batch("clip")
    spec = gate_file(tmp_path / "gate.safetensors", model)
    with torch.no_grad(), tokprune.attach(model, spec) as attachment:
        model(**tiny.row(inputs, 0))
        assert attachment.report.images[0].selector.macs == 4 * (2 * WIDTH * 4 + 4 * 2)


# ---- gate files


def metadata(**more):
    decoder = decoder_of(tiny.model())
    facts = {"n_layers": str(DEPTH), "width": str(WIDTH), "fingerprint": decoder.fingerprint, "notes": "{}"}
    return {"format": "tokprune gates 1", **facts, **more}


def tensors(h=3, layers=(0,), **more):
    found = {f"gate.{i}.in": torch.zeros(h, 2 * WIDTH) for i in layers}
    return found | {f"gate.{i}.out": torch.zeros(2, h) for i in layers} | more


BAD = {
    "another format": (tensors(), metadata(format="pickle")),
    "no metadata": (tensors(), None),
    "no depth": (tensors(), metadata(n_layers="many")),
    "negative width": (tensors(), metadata(width="-64")),
    "notes that are no object": (tensors(), metadata(notes="[1]")),
    "notes that are no JSON": (tensors(), metadata(notes="{")),
    "notes without a bottom": (tensors(), metadata(notes="[" * 100_000)),
    "no gates": ({"x": torch.zeros(1)}, metadata()),
    "something beside them": (tensors(other=torch.zeros(1)), metadata()),
    "half a gate": ({"gate.0.in": torch.zeros(3, 2 * WIDTH)}, metadata()),
    "a gate behind the last layer": (tensors(layers=(4,)), metadata()),
    "another width": (tensors(), metadata(width="32")),
    "two widths": (tensors() | tensors(h=5, layers=(1,)), metadata()),
    "no width": (tensors(h=0), metadata()),
    "integers": ({k: v.long() for k, v in tensors().items()}, metadata()),
    "not finite": (tensors() | {"gate.0.out": torch.full((2, 3), math.nan)}, metadata()),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_gate_file_is_one_clear_error(what, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file(BAD[what][0], path, BAD[what][1])
    with pytest.raises(OptionError, match=r"bad.safetensors.*tokprune fit-exit"):
        tokprune.attach(tiny.model(), f"dyvte:gate={path}")


def test_no_gate_file_at_all(tmp_path):
    path = tmp_path / "gate.safetensors"
    with pytest.raises(OptionError, match="no such file"):
        read_gates(path)
    with pytest.raises(OptionError, match="is not a file"):
        read_gates(tmp_path)
    gate_file(path, tiny.model(dtype=torch.float64))
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[:-10], b"\xff" * 64, pickle.dumps({"gate.0.in": 1}), b"\x00" * 8 + whole):
        path.write_bytes(broken)
        with pytest.raises(OptionError, match="cannot be read"):
            read_gates(path)


def test_gates_of_another_model_are_refused(tmp_path):
    path = tmp_path / "gate.safetensors"
    model = tiny.model()
    decoder = decoder_of(model)
    for other in (Decoder(DEPTH, WIDTH, "other"), Decoder(DEPTH + 1, WIDTH, decoder.fingerprint)):
        write_gates(path, Gates(other, {0: (torch.zeros(1, 2 * WIDTH), torch.zeros(2, 1))}))
        with pytest.raises(OptionError, match="fitted to a language model of"):
            tokprune.attach(model, f"dyvte:gate={path}")
    assert not any("_tokprune" in key for key in vars(model.model))


def test_a_gate_file_that_cannot_be_written(tmp_path):
    gates = Gates(Decoder(DEPTH, WIDTH), {0: (torch.zeros(1, 2 * WIDTH), torch.zeros(2, 1))})
    with pytest.raises(OSError, match=r"."):
        write_gates(tmp_path / "nowhere" / "gate.safetensors", gates)


# ---- visual_exit


@kinds
@torch.no_grad()
def test_mass_below_nothing_never_exits_and_is_bit_identical(kind):
    model, inputs = tiny.model(kind), tiny.batch(kind=kind)
    logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
    with tokprune.attach(model, "visual_exit:threshold=0") as attachment:
        assert torch.equal(model(**inputs).logits, logits)
        assert attachment.report.layers == [inputs["input_ids"].shape[1]] * DEPTH
        assert torch.equal(tiny.generate(model, inputs), tokens)
        assert exits_of_all(attachment) == [None] * 3


def test_a_mass_at_the_threshold_stays():
    """Also where attention underflows to nothing: a threshold of 0 never exits."""
    for threshold, mass, want in ((0.0, [0.0, 0.0], False), (0.5, [0.5, 0.1], False), (0.5, [0.4, 0.1], True)):
        signals = {Signal(Kind.LM_MASS, (0, 1)): torch.tensor([mass])}
        tokens = VisualTokens.of(torch.zeros(1, 4, 3), grid_layout(2, 2), signals)
        assert tokprune.get_method("visual_exit", threshold=threshold).select(tokens, 0).keep.any() == (not want)


def test_gates_that_were_first_used_in_inference_mode_work_outside_of_it(tmp_path):
    model, inputs = model_and_batch("clip")
    spec = gate_file(tmp_path / "gate.safetensors", model)
    with torch.inference_mode():
        attachment = tokprune.attach(model, spec)
        want = model(**inputs).logits
    with attachment, torch.enable_grad():
        logits = model(**inputs).logits
        logits.sum().backward()
    model.zero_grad()
    assert torch.equal(logits, want)


@kinds
@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ("", 2),
        (":patience=3", 3),
        (":first=3", 3),
        (":patience=1:first=1", 1),
        (":first=-1", 4),
        (":patience=4:first=1", 4),
    ],
)
@torch.no_grad()
def test_mass_below_everything_exits_at_the_first_layer_allowed(kind, options, layer):
    model, inputs = model_and_batch(kind)
    with tokprune.attach(model, f"visual_exit:threshold=1{options}") as attachment:
        logits = model(**inputs).logits
        assert exits_of_all(attachment) == [layer] * 3
    with tokprune.attach(model, f"visual_exit:layer={layer}"):
        assert torch.equal(model(**inputs).logits, logits)


@kinds
@pytest.mark.parametrize("layer", [1, 3, -1])
@torch.no_grad()
def test_fixed_layer_equals_the_oracle(kind, layer):
    model, inputs = model_and_batch(kind)
    with tokprune.attach(model, f"visual_exit:layer={layer}") as attachment:
        logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
        assert torch.equal(tiny.generate(model, inputs, use_cache=False), tokens)
        assert set(exits_of_all(attachment)) == {layer % DEPTH}
    for r in range(3):
        single = tiny.row(inputs, r, kind=kind)
        padding = inputs["input_ids"].shape[1] - single["input_ids"].shape[1]
        left, embeds = gone(single, layer % DEPTH), oracle.full_embeds(model, single)
        want = oracle.masked_logits(model, embeds, left, padding)
        alive = single["input_ids"][0] != tiny.IMAGE
        assert (logits[r, padding:][alive] - want[0, alive]).abs().max() < 1e-9
        assert tokens[r].tolist() == oracle.masked_greedy(model, embeds, left)


@torch.no_grad()
def test_mass_is_the_attention_that_eager_layers_give():
    """Exits at a threshold between the masses of two rows: they do not leave together."""
    model, inputs = tiny.model("clip", "eager"), tiny.batch()
    maps = model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"] == tiny.IMAGE
    mass = torch.stack([(m[:, :, -1].mean(1) * visual).sum(1) for m in maps], 1)[:2]  # (rows, layers)
    pairs = torch.maximum(mass[:, :-1], mass[:, 1:])  # of the two layers before a cut
    threshold = float(pairs.amin(1).mean())
    want = [next((layer + 2 for layer in range(DEPTH - 2) if pairs[r, layer] < threshold), None) for r in (0, 1)]
    assert sorted(w is None for w in want) == [False, True] or want[0] != want[1]
    with tokprune.attach(model, f"visual_exit:threshold={threshold!r}") as attachment:
        model(**inputs)
        assert exits_of(attachment)[:2] == [{want[0]}, {want[1]}]


@pytest.mark.parametrize(
    "options",
    [
        "threshold=1.5",
        "threshold=-0.1",
        "patience=0",
        "patience=5",
        "first=0",
        "layer=0",
        "first=5",
        "layer=5",
        "layer=-9",
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(OptionError, match="use "):
        tokprune.attach(tiny.model(), f"visual_exit:{options}")


def test_a_fixed_layer_beside_a_first_one_and_a_budget_are_refused():
    with pytest.raises(OptionError, match="leave one out"):
        tokprune.get_method("visual_exit:layer=3:first=2")
    with pytest.raises(BudgetError, match="takes no budget"):
        tokprune.attach(tiny.model(), "visual_exit", keep_ratio=0.5)


# ---- both


@pytest.mark.parametrize("spec", ["visual_exit:threshold=1", "visual_exit:layer=2"])
@pytest.mark.parametrize("text", [(), (5,), (5, 6, 7)])
@torch.no_grad()
def test_a_prompt_without_text_behind_its_image_keeps_everything(spec, text):
    """Nothing but the picture, or text before it alone; beside a row that leaves."""
    model = tiny.model(dtype=torch.float64)
    bare = [*text, *[tiny.IMAGE] * tiny.N_VISUAL]
    inputs = tiny.collate([bare, [1, *[tiny.IMAGE] * tiny.N_VISUAL, 8, 9]], [0, 1], torch.float64)
    want = model(**inputs).logits
    with tokprune.attach(model, spec) as attachment:
        logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
        assert exits_of_all(attachment) == [None, 2]
    n = len(bare)
    assert (logits[0, -n:] - want[0, -n:]).abs().max() < 1e-9
    assert logits.isfinite().all()
    assert torch.equal(tokens[:1], tiny.generate(model, inputs)[:1])


@torch.no_grad()
def test_one_read_from_the_device_at_every_candidate_layer(tmp_path, monkeypatch):
    model, inputs = model_and_batch("clip")
    dyvte = gate_file(tmp_path / "gate.safetensors", model)
    for spec, n_layers in ((dyvte, 4), ("visual_exit:threshold=0.0001", 3), ("visual_exit:layer=2", 1)):
        with tokprune.attach(model, spec) as attachment:
            cutter = attachment._observer.cutter
            reads, cut, inside = [], cutter.cut, []

            def spied(layer, hidden, here, cut=cut, inside=inside, reads=reads):
                inside.append(layer)
                try:
                    return cut(layer, hidden, here)
                finally:
                    inside.clear()

            with monkeypatch.context() as patched:
                for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "nonzero", "numpy"):
                    original = getattr(torch.Tensor, name)

                    def spy(self, *args, original=original, name=name, reads=reads, inside=inside, **kwargs):
                        if inside:
                            reads.append((inside[0], name))
                        return original(self, *args, **kwargs)

                    patched.setattr(torch.Tensor, name, spy)
                patched.setattr(cutter, "cut", spied)
                model(**inputs)
            assert reads == [(layer, "tolist") for layer in cutter.cut_layers]
            assert len(reads) == n_layers


# ---- fitting


def test_the_label_rule():
    """Two tokens of four words; what counts is the most likely token, and 3 % of the cross-entropy."""
    answer = torch.tensor([1, 2])
    bare = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    right, kl = fit_exit.label(bare, bare, answer)
    assert right
    assert kl == pytest.approx(0, abs=1e-12)
    better = bare * 2
    assert fit_exit.label(bare, better, answer)[0]
    other = bare.clone()
    other[1] = torch.tensor([0.0, 0.0, 3.0, 3.1])  # one of two tokens has changed
    assert not fit_exit.label(bare, other, answer)[0]

    def entropy(x):
        return float(torch.nn.functional.cross_entropy(x.double(), answer))

    def worse(factor):
        low, high = 0.5, 1.0  # the same most likely tokens, at a cross-entropy of `factor` times
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if entropy(bare * middle) > factor * entropy(bare) else (low, middle)
        return bare.double() * high

    assert fit_exit.label(bare.double(), worse(1.029), answer)[0]
    assert not fit_exit.label(bare.double(), worse(1.031), answer)[0]
    p, q = (x.softmax(-1).double() for x in (bare, other))
    assert fit_exit.label(bare, other, answer)[1] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    swapped = torch.tensor([[2.0, 0.0, 1.9, 0.0], [1.9, 0.0, 2.0, 0.0]])  # the same cross-entropy, other words
    assert not fit_exit.label(swapped, swapped.flip(0), torch.tensor([1, 3]))[0]
    wrong = torch.tensor([3, 3])  # agreement of a wrong answer is agreement
    assert fit_exit.label(bare, bare * 0.999, wrong)[0]


def test_calibrated_layer_and_histogram():
    assert fit_exit.calibrated_layer([0.5, 0.009, 0.2, 0.001], 0.01) == 2
    assert fit_exit.calibrated_layer([0.5, 0.2], 0.01) is None
    leaves = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
    assert fit_exit.exit_layers(leaves) == {"1": 1, "2": 2, "3": 0, "never": 1}


@pytest.fixture(scope="module")
def runner():
    torch.manual_seed(0)
    return Runner.load("tiny-llava")


class Few(FindIt):
    """A few scenes; drawing all takes seconds."""

    def __init__(self, split="test", n_scenes=12):
        super().__init__(split, n_scenes)


@torch.no_grad()
def test_observed_features_are_what_gates_read_and_labels_are_of_masked_columns(runner, tmp_path, monkeypatch):
    task = Few("train")
    samples = [s for s in task.samples() if s.kind in ("colour", "position")][:5]  # answers of one word and of two
    assert len({len(s.answer.split()) for s in samples}) == 2
    decoder = decoder_of(runner.model)
    seen = fit_exit.observe(runner, task, samples, decoder)
    assert seen.features.shape == (5, decoder.n_layers - 1, 2 * decoder.width)
    h, read, logits = 1, {}, Gates.logits
    zeros = {i: (torch.zeros(h, 2 * decoder.width), torch.zeros(2, h)) for i in range(decoder.n_layers - 1)}
    write_gates(tmp_path / "gate", Gates(decoder, zeros))
    monkeypatch.setattr(Gates, "logits", lambda self, i, x: read.setdefault(i, x) is None or logits(self, i, x))
    for r, sample in enumerate(samples):
        inputs = runner.prepare(task, [sample], [sample.image_id])
        read.clear()
        with tokprune.attach(runner.model, f"dyvte:gate={tmp_path / 'gate'}"):
            runner.model(**inputs)
        got = torch.cat([read[i] for i in range(decoder.n_layers - 1)])
        assert (got - seen.features[r]).abs().max() < 1e-4
        again = fit_exit.observe(runner, task, [sample], decoder)
        assert torch.allclose(again.kl, seen.kl[r : r + 1], atol=1e-5)
        single = {k: v for k, v in inputs.items()}
        tokenizer = runner.processor.tokenizer
        answer = [*tokenizer(sample.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.cat([single["input_ids"], torch.tensor([answer])], 1)
        visual = ids == runner.model.config.image_token_id
        embeds = runner.model.get_input_embeddings()(ids).clone()
        embeds[visual] = oracle.features_of(runner.model, single)
        bare = oracle.masked_logits(runner.model, embeds, {})[0, -len(answer) - 1 : -1]
        for layer in (2, 6):
            masked = oracle.masked_logits(runner.model, embeds, {layer: visual[0]})[0, -len(answer) - 1 : -1]
            _, kl = fit_exit.label(bare, masked, torch.tensor(answer))
            assert float(seen.kl[r, layer - 1]) == pytest.approx(kl, rel=1e-2, abs=1e-5)


ARGUMENTS = ("--task", "findit", "--samples", "8", "--steps", "30", "--hidden", "8", "--batch-size", "4")


@pytest.mark.slow
def test_fit_exit_through_the_command_line_and_again_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("tokprune.eval.tasks.findit.FindIt", Few)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    done = tokprune_cli("fit-exit", *ARGUMENTS, "--out", str(whole))
    assert done.returncode == 0, done.stderr
    assert f"dyvte:gate={whole}" in done.stdout
    notes = read_gates(whole).notes
    assert notes["n_fit"] == 8
    assert notes["n_held_out"] == 2
    assert sum(notes["exit_layers"].values()) == 2
    assert len(notes["label_share"]) == len(notes["kl"]) == 7
    assert not list(tmp_path.glob("*.partial*"))
    monkeypatch.setattr(fit_exit.Fit, "every", 1)  # a checkpoint a batch, and every ten steps
    observe, train, calls = fit_exit.observe, fit_exit.Fit._train, []

    def killed_observing(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append("observe")
        return observe(*args)

    def killed_training(self, seen):
        if self.step == 25:
            raise KeyboardInterrupt
        return train(self, seen)

    monkeypatch.setattr(fit_exit, "observe", killed_observing)
    with pytest.raises(KeyboardInterrupt):
        fit_exit_again(cut)
    monkeypatch.setattr(fit_exit, "observe", lambda *args: calls.append("again") or observe(*args))
    monkeypatch.setattr(fit_exit.Fit, "_train", killed_training)
    with pytest.raises(KeyboardInterrupt):
        fit_exit_again(cut)
    assert calls == ["observe", "observe", "again"]
    monkeypatch.setattr(fit_exit.Fit, "_train", train)
    other = tokprune_cli("fit-exit", *ARGUMENTS, "--out", str(cut), "--lr", "0.1")
    assert other.returncode == 2
    assert "lr" in other.stderr
    done = tokprune_cli("fit-exit", *ARGUMENTS, "--out", str(cut))
    assert "10 questions observed, 20 steps done" in " ".join(done.stdout.split())
    assert calls == ["observe", "observe", "again"]
    a, b = read_gates(whole), read_gates(cut)
    for i in a.layers:
        assert all(torch.equal(x, y) for x, y in zip(a.weights[i], b.weights[i], strict=True))
    assert json.dumps(a.notes) == json.dumps(b.notes)
    assert "exists already" in tokprune_cli("fit-exit", *ARGUMENTS, "--out", str(cut)).stderr


def fit_exit_again(out):
    """The same as the command, in which an interrupt would end the test."""
    runner = Runner.load("tiny-llava")
    settings = fit_exit.Settings(steps=30, hidden=8, samples=8, batch_size=4)
    fit_exit.Fit(runner, "tiny-llava", Few(), settings, out).run(fit_exit.Console(quiet=True))


def test_fit_exit_refuses_what_it_cannot_do(tmp_path, folder, runner, monkeypatch):
    monkeypatch.setattr("tokprune.eval.tasks.findit.FindIt", Few)
    out = tmp_path / "gate.safetensors"
    no_split = tokprune_cli("fit-exit", "--task", str(folder), "--out", str(out))
    assert no_split.returncode == 2
    assert "no training split" in no_split.stderr
    for option in ("--steps", "--samples", "--hidden", "--batch-size", "--lr", "--kl"):
        assert f"{option} " in tokprune_cli("fit-exit", "--task", "findit", "--out", str(out), option, "0").stderr
    nowhere = tokprune_cli("fit-exit", *ARGUMENTS, "--out", "/proc/no/gate")
    assert nowhere.returncode == 2
    assert "cannot write" in nowhere.stderr
    out.with_name("gate.safetensors.partial").write_bytes(b"\x00" * 40)
    broken = tokprune_cli("fit-exit", *ARGUMENTS, "--out", str(out))
    assert "; remove" in broken.stderr


def test_fit_and_validation_share_no_picture_and_no_test_picture():
    training, fit, held = fit_exit.training_part(Few(), fit_exit.Settings(samples=20))
    assert not {s.image_id for s in fit} & {s.image_id for s in held}
    assert training.split == "train"
    assert all(s.image_id.startswith("train-") for s in fit + held)


# ---- measuring


@torch.no_grad()
def test_rows_of_exits(runner, tmp_path):
    task = Few()
    exits = Exits(runner, "tiny-llava", task, task.samples()[:6], batch_size=4)
    none, fixed, pruned = (
        exits.row(c) for c in (Config("none"), Config("visual_exit:layer=4"), Config("vtc_cls", 0.25))
    )
    assert none["exit_layers"]["never"] == 6
    assert none["llm_flops_after"] == none["llm_flops_before"] == fixed["llm_flops_before"]
    assert fixed["exit_layers"]["4"] == 6
    assert fixed["gone_before_last_quarter"] == 1
    assert exits.row(Config("visual_exit:layer=7"))["gone_before_last_quarter"] == 0
    ratio = fixed["llm_flops_after"] / fixed["llm_flops_before"]
    assert 0.5 < ratio < 0.6
    assert ratio == pytest.approx(fixed["llm_flops_ratio_as_run"], abs=0.01)
    assert pruned["llm_flops_after"] < fixed["llm_flops_after"]
    near = exits.nearest_ratio(fixed["llm_flops_after"])
    assert exits.row(Config("uniform", near))["llm_flops_after"] == pytest.approx(fixed["llm_flops_after"], rel=0.01)
    assert columns_by_layer(None, [7, 8], 3) == [[7] * 3, [8] * 3]
