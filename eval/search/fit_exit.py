"""Fits DyVTE's gates to a model on a task's training questions; `exits` measures them on the test questions.

tokprune fit-exit --model tiny-llava --task findit --out gate.safetensors

As in the paper (arXiv 2411.19628) the model is frozen, and a gate learns whether the model's own answer would stay the
same. Exit is right if, on the tokens of the expected answer and its end token, more than 99 % of the most likely tokens
are the same and the cross-entropy is below 1.03 times the unmasked one. The paper draws a layer per step and runs the
batch twice. Here one pass gives the states of all layers, and the labels cannot change while the model is frozen. So
states and labels of every (question, layer) are computed once, and a step draws a layer and questions among them, which
is the same distribution. For the labels, the visual tokens are really removed. A gate reads states of the prompt, which
cannot see the answer after it.

The paper's learning rate, 6e-5, is for gates of width 2048 on states of width 4096. The default, 1e-3, is for gates of
width 256 on the embedded model (width 160). On 400 held-out questions, 400 steps were worse; 4000 steps, or a
rate of 3e-3 or 3e-4, were no better.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import SafetensorError, safe_open
from tokprune.integrations.transformers import family_of
from torch import Tensor, nn

import tokprune
from tokprune.core.errors import RunError
from tokprune.core.files import write_tensors
from tokprune.core.signals import Decoder
from tokprune.methods.gates import Gates, Weights, gate_features, gate_logits, write_gates

from ..report.terminal import Grid
from ..run.locks import alone_at
from ..run.runner import Runner
from ..tasks import Sample, Task

AGREEMENT, CROSS_ENTROPY = 0.99, 1.03  # the paper's
WARM_UP = 0.03
HELD_OUT = 5  # one training picture in 5 is for validation
NEVER = "never"
WIDEST = 65536


@dataclass(frozen=True)
class Settings:
    """Options of a fit.

    Args:
        steps: steps of the optimiser, each at one layer.
        hidden: width of a gate.
        samples: training questions to fit to; a quarter as many, on other pictures, are for validation.
        seed: for the choice of questions, the first weights and the draws of every step.
        batch_size: questions per step, and per pass of the model.
        lr: the highest learning rate, after a warm-up of 3 %; a cosine lowers it.
        kl: nats by which a fixed exit may change the distribution of the answers, in the mean.
    """

    steps: int = 2000
    hidden: int = 256
    samples: int = 2048
    seed: int = 0
    batch_size: int = 16
    lr: float = 1e-3
    kl: float = 0.01

    def __post_init__(self):
        for name in ("steps", "hidden", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} takes a whole number of at least 1")
        if self.hidden > WIDEST:
            raise RunError(f"--hidden takes at most {WIDEST}; the paper's is 2048 for 7B")
        if not (self.lr > 0 and self.kl > 0 and math.isfinite(self.lr + self.kl)):
            raise RunError("--lr and --kl take numbers above 0")


@dataclass
class Seen:
    """States and labels of some questions; index l is an exit after layer l.

    Args:
        features: (n, L - 1, 2 D), the input of the gates.
        labels: (n, L - 1) bool, whether exit is right.
        kl: (n, L - 1) nats, from the unmasked to the masked distribution, mean over the answer's tokens.
    """

    features: Tensor
    labels: Tensor
    kl: Tensor

    def __len__(self):
        return len(self.labels)

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """Concatenated."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("features", "labels", "kl")))


def label(unmasked: Tensor, masked: Tensor, answer: Tensor) -> tuple[bool, float]:
    """Whether exit is right for one question, and the divergence in nats.

    Args:
        unmasked: (T, V) logits that predict the answer's tokens.
        masked: the same without visual tokens after a layer.
        answer: (T,) the expected tokens.
    """
    before, after = (x.double().log_softmax(-1) for x in (unmasked, masked))
    same = (unmasked.argmax(-1) == masked.argmax(-1)).double().mean() > AGREEMENT
    near = F.nll_loss(after, answer) < CROSS_ENTROPY * F.nll_loss(before, answer)
    return bool(same & near), float(F.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean())


@torch.no_grad()
def observe(runner: Runner, task: Task, samples: Sequence[Sample], decoder: Decoder) -> Seen:
    """States and labels of one batch, from an unmasked pass and one pass per exit layer."""
    model, tokenizer = runner.model, runner.processor.tokenizer
    inputs = dict(runner.prepare(task, samples, [s.image_id for s in samples]))
    width, device = inputs["input_ids"].shape[1], model.device
    answers = [tokenizer(s.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for s in samples]
    n = max(map(len, answers))
    tail = torch.tensor([a + [tokenizer.eos_token_id] * (n - len(a)) for a in answers], device=device)
    real = torch.tensor([[1] * len(a) + [0] * (n - len(a)) for a in answers], device=device)
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tail], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], real], 1),
    }

    def passed(**more) -> tuple[Tensor, Any]:
        out = model(**whole, logits_to_keep=n + 1, use_cache=False, **more)
        return out.logits[:, -n - 1 : -1], out

    unmasked, out = passed(output_hidden_states=True)
    visual = family_of(model).is_placeholder(inputs["input_ids"])
    after = (torch.arange(width, device=device) * visual).amax(1).tolist()
    if max(after) == width - 1:
        raise RunError("the prompt ends with a picture, but an exit needs text after it; use another chat template")
    states = torch.stack(out.hidden_states[1 : decoder.n_layers], 1)
    features = [gate_features(states[r, :, c + 1 : width]) for r, c in enumerate(after)]
    found = []
    for layer in range(1, decoder.n_layers):
        with tokprune.attach(model, f"visual_exit:layer={layer}"):
            masked, _ = passed()
        found.append(
            [label(unmasked[r, : len(a)], masked[r, : len(a)], tail[r, : len(a)]) for r, a in enumerate(answers)]
        )
    labels, kl = (torch.tensor([[pair[i] for pair in row] for row in found]).T for i in (0, 1))
    return Seen(torch.stack(features).cpu(), labels.contiguous(), kl.float().contiguous())


def training_part(task: Task, settings: Settings) -> tuple[Task, list[Sample], list[Sample]]:
    """The training split, its questions to fit to, and those to validate on, which are on other pictures.

    Raises:
        RunError: the task has no training split.
    """
    if task.train_samples() is None:
        raise RunError(f"{task.name} has no training split to fit to; type --task findit, findit_hd or easyvqa")
    training: Task = type(task)("train")  # type: ignore[call-arg]
    samples = list(training.samples())
    random.Random(settings.seed).shuffle(samples)
    held = [zlib.crc32(s.image_id.encode()) % HELD_OUT == 0 for s in samples]
    fit, validation = ([s for s, h in zip(samples, held, strict=True) if h == want] for want in (False, True))
    return training, fit[: settings.samples], validation[: max(1, settings.samples // 4)]


class Fit:
    """A fit; an interrupted one resumes from OUT.partial.

    Args:
        runner: model and processor.
        model_name: as the user typed it.
        task: has a training split.
        settings: the options.
        out: the gate file to write.

    Raises:
        RunError: `out` exists, or the task has no training split.
    """

    every = 20  # batches between two checkpoints while observing; ten times as many steps while training

    def __init__(self, runner: Runner, model_name: str, task: Task, settings: Settings, out: Path):
        self.runner, self.settings, self.out = runner, settings, out
        self.partial = Path(f"{out}.partial")
        self._refuse_gate()
        self.task, *parts = training_part(task, settings)
        self.samples, self.n_fit = parts[0] + parts[1], len(parts[0])
        self.decoder: Decoder = family_of(runner.model).decoder
        self.facts = {
            "model": model_name,
            "weights": runner.fingerprint(),
            "prompt": runner.prompt_fingerprint(),
            "task": task.name,
            "questions": zlib.crc32(repr(self.samples).encode()),
            **asdict(settings),
        }
        self.seen: list[Seen] = []
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.gates = nn.ModuleList(self._gate() for _ in range(self.decoder.n_layers - 1)).to(runner.model.device)
        self.optimiser = torch.optim.AdamW(self.gates.parameters(), lr=settings.lr)

    def _refuse_gate(self) -> None:
        if self.out.exists():
            raise RunError(f"{self.out} exists already; remove it, or name another file with --out")

    def _gate(self) -> nn.Module:
        first = nn.Linear(2 * self.decoder.width, self.settings.hidden, bias=False)
        return nn.ModuleList([first, nn.Linear(self.settings.hidden, 2, bias=False)])

    def weights(self, layer: int) -> Weights:
        """The weights of one gate."""
        first, last = self.gates[layer]  # type: ignore[misc]
        return first.weight, last.weight

    def run(self, console: Console) -> Gates:
        """Observe, train, validate, write the gates and print their figures.

        Raises:
            RunError: another process writes to `out`, it exists, or OUT.partial belongs to another fit.
        """
        with alone_at(self.out):
            self._refuse_gate()  # another process may have finished meanwhile
            self._resume()
            return self._run(console)

    def _run(self, console: Console) -> Gates:
        size, done = self.settings.batch_size, sum(map(len, self.seen))
        if done or self.step:
            console.print(f"The fit resumes from {self.partial}: {done} questions observed, {self.step} steps done")
        for start in range(done, len(self.samples), size):
            self.seen.append(observe(self.runner, self.task, self.samples[start : start + size], self.decoder))
            if start // size % self.every == self.every - 1:
                self._save()
        seen = Seen.joined(self.seen)
        self._save()
        train, held = (Seen(*(x[part] for x in vars(seen).values())) for part in self._parts())
        while self.step < self.settings.steps:
            self._train(train)
            if self.step % (10 * self.every) == 0:
                self._save()
        pairs = {i: tuple(w.detach().cpu() for w in self.weights(i)) for i in range(len(self.gates))}
        gates = Gates(self.decoder, pairs, {"fit": self.facts, **_notes(pairs, train, held, self.settings.kl)})
        try:
            write_gates(self.out, gates)
        except OSError as error:
            raise RunError(
                f"cannot write {self.out}: {error}; free some space and type the same command again"
            ) from error
        self.partial.unlink(missing_ok=True)
        show(gates.notes, console)
        return gates

    def _parts(self) -> tuple[slice, slice]:
        return slice(self.n_fit), slice(self.n_fit, None)

    def _train(self, seen: Seen) -> None:
        """One step; its draws and its learning rate depend only on its number."""
        s, device = self.settings, self.runner.model.device
        draw = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step)
        layer = int(torch.randint(len(self.gates), (1,), generator=draw))
        at = torch.randint(len(seen), (s.batch_size,), generator=draw)
        warm = max(1, round(WARM_UP * s.steps))
        decay = 0.5 * (1 + math.cos(math.pi * self.step / s.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = s.lr * min(1, (self.step + 1) / warm) * decay
        logits = gate_logits(self.weights(layer), seen.features[at, layer].to(device))
        F.cross_entropy(logits, seen.labels[at, layer].long().to(device)).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1

    def _save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        tensors = {f"gate.{name}": w for name, w in self.gates.named_parameters()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{name}": x for name, x in state.items()}
        seen = Seen.joined(self.seen)
        tensors |= {f"seen.{name}": x for name, x in vars(seen).items()}
        metadata = {"facts": json.dumps(self.facts), "step": str(self.step)}
        try:
            write_tensors(self.partial, tensors, metadata)
        except OSError as error:
            raise RunError(
                f"cannot write {self.partial}: {error}; free some space, or name another file with --out"
            ) from error

    def _resume(self) -> None:
        """Read the checkpoint, if there is one."""
        if not self.partial.exists():
            return
        again = f"remove {self.partial}, or name another file with --out"
        try:
            with safe_open(self.partial, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            facts, self.step = json.loads(metadata["facts"]), int(metadata["step"])
            other = [name for name in self.facts if facts.get(name) != self.facts[name]]
            if other:
                raise RunError(f"{self.partial} belongs to a fit with other settings ({', '.join(other)}); {again}")
            self.seen = [Seen(*(tensors[f"seen.{name}"] for name in ("features", "labels", "kl")))]
            weights = {name: tensors[f"gate.{name}"] for name, _ in self.gates.named_parameters()}
            self.gates.load_state_dict(weights)
            state: dict[int, dict[str, Tensor]] = {}
            for name in (n for n in tensors if n.startswith("optimiser.")):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensors[name]
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"cannot read {self.partial}; {again}") from error


def exit_layers(leaves: Tensor) -> dict[str, int]:
    """Rows by the first layer that sees no visual tokens, from (n, L - 1) bool."""
    first = [next((i + 1 for i, leave in enumerate(row) if leave), None) for row in leaves.tolist()]
    return histogram(first, leaves.shape[1] + 1)


def histogram(first: Sequence[int | None], n_layers: int) -> dict[str, int]:
    """How many rows exit before layer "1", "2" ..., and how many "never" do."""
    counts = Counter(first)
    return {**{str(i): counts[i] for i in range(n_layers) if i or counts[0]}, NEVER: counts[None]}


def calibrated_layer(kl: Sequence[float], limit: float) -> int | None:
    """VTW's rule: the earliest layer at which an exit of all rows costs less than `limit` nats in the mean."""
    return next((i + 1 for i, value in enumerate(kl) if value < limit), None)


def _notes(weights: dict, fit: Seen, held: Seen, limit: float) -> dict[str, Any]:
    """Figures for the gate file, by layer 1 .. L - 1, on fitted and held-out questions."""
    logits = torch.stack([gate_logits(pair, held.features[:, i]) for i, pair in weights.items()], 1)
    leaves = logits[..., 1] > logits[..., 0]
    kl = fit.kl.double().mean(0).tolist()
    return {
        "n_fit": len(fit),
        "n_held_out": len(held),
        "label_share": held.labels.double().mean(0).tolist(),
        "accuracy": (leaves == held.labels).double().mean(0).tolist(),
        "exit_layers": exit_layers(leaves),
        "label_exit_layers": exit_layers(held.labels),
        "kl": kl,
        "held_out_kl": held.kl.double().mean(0).tolist(),
        "kl_limit": limit,
        "fixed_layer": calibrated_layer(kl, limit),
    }


def show(notes: Any, console: Console) -> None:
    """Print the figures of a gate file as a table, and the best fixed layer."""
    title = f"{notes['n_held_out']} held-out training questions; fitted to {notes['n_fit']}"
    lines = []
    for i, share in enumerate(notes["label_share"]):
        counts = [str(notes[name][str(i + 1)]) for name in ("exit_layers", "label_exit_layers")]
        lines.append(
            [str(i + 1), f"{share:.3f}", f"{notes['accuracy'][i]:.3f}", *counts, f"{notes['held_out_kl'][i]:.4f}"]
        )
    lines.append([NEVER, "", "", str(notes["exit_layers"][NEVER]), str(notes["label_exit_layers"][NEVER]), ""])
    header = ["exit before layer", "exit is right", "gate is right", "gates exit", "labels exit", "KL, nats"]
    console.print(Grid(header, lines, title))
    fixed = notes["fixed_layer"]
    if fixed is None:
        console.print(
            f"No fixed layer changes the answers by less than {notes['kl_limit']:g} nats (--kl sets another limit)"
        )
    else:
        console.print(
            f"A fixed exit that changes the answers by less than {notes['kl_limit']:g} nats: visual_exit:layer={fixed}"
        )
