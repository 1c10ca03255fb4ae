"""Searches for a schedule, given a function that evaluates one: G-Search and P-Sigmoid (arXiv 2412.00556)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import optuna
from optuna.trial import Trial, TrialState

from tokprune.core.errors import RunError
from tokprune.core.schedules import PAPER_DEPTH, Sigmoid, half_up
from tokprune.core.signals import Decoder

from .trials import Counts, Point

EVALUATIONS, TRIALS = 6, 30  # per layer of G-Search; in all of P-Sigmoid
STEEPNESS = 0.25, 32.0  # from nearly a straight line to one cut
SLACK = 1e-9  # rounding error between two equal accuracies
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Evaluate(Protocol):
    """Evaluates a schedule, {} for the unpruned model, and tells the trial that proposed it."""

    def __call__(self, counts: Counts, trial: Trial | None = None) -> Point:
        """The figures of a schedule."""


# ---- G-Search


def fewest(most: int, holds: Callable[[int], bool], evaluations: int) -> int:
    """The smallest count from 0 to `most` that holds. 0 is tried first, then bisection; `most` is known to hold.

    Bisection is by ratio: 1 to 2 is as far as 50 to 100. It assumes that where a count holds, larger ones do. Accuracy
    is not monotone, so a smaller count may hold that was not tried.
    """
    if holds(0):
        return 0
    low, high = 0, most
    for _ in range(evaluations - 1):
        if high - low <= 1:
            break
        middle = min(max(round(math.sqrt((low + 1) * (high + 1))) - 1, low + 1), high - 1)
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def g_search(evaluate: Evaluate, n_layers: int, n_visual: int, tolerance: float, evaluations: int) -> Counts:
    """The fewest tokens from every layer on, from shallow to deep, while accuracy stays within the tolerance.

    Greedy: later layers get what the first ones leave of the tolerance.

    Args:
        evaluate: gives the accuracy of a schedule.
        n_layers: number of decoder layers.
        n_visual: visual tokens of the largest picture.
        tolerance: accuracy that may be lost, from 0 to 1.
        evaluations: at most so many per layer.
    """
    least = evaluate({}).accuracy - tolerance - SLACK
    found: dict[int, int] = {}
    left = n_visual
    for layer in range(1, n_layers):
        before = dict(found)
        n = fewest(left, lambda n: evaluate({**before, layer: n}).accuracy >= least, evaluations)  # noqa: B023
        if n < left:
            found[layer] = left = n
        if not left:
            break
    return found


def best_single(evaluate: Evaluate, n_layers: int, n_visual: int, tolerance: float, evaluations: int) -> Counts:
    """The control of G-Search: the single cut within the tolerance with the fewest tokens over all layers.

    Arguments as in `g_search`. The schedule is empty if no cut is within the tolerance.
    """
    least = evaluate({}).accuracy - tolerance - SLACK
    found: list[tuple[int, int, int]] = []
    for layer in range(1, n_layers):
        n = fewest(n_visual, lambda n: evaluate({layer: n}).accuracy >= least, evaluations)  # noqa: B023
        if n < n_visual:
            found.append((layer * n_visual + (n_layers - layer) * n, layer, n))
    return {layer: n for _, layer, n in sorted(found)[:1]}


# ---- P-Sigmoid


def sigmoid_ratios(budget: float, n_layers: int, steepness: float, middle: float) -> list[float] | None:
    """Ratio of tokens left in every layer, r(l) = lo + (1 - lo) / (1 + exp(steepness (l - middle))), r(0) = 1.

    `lo` is solved so that the mean over all layers is the budget; None if it would be below 0.
    """
    sigmoid = Sigmoid(steepness, middle)
    falls = [sigmoid.fall(layer, n_layers) for layer in range(1, n_layers)]
    most = n_layers - 1 - sum(falls)
    lo = (budget * n_layers - 1 - sum(falls)) / most if most > 0 else -1.0
    return None if lo < 0 else [1.0, *(lo + (1 - lo) * fall for fall in falls)]


def counts_of(ratios: Sequence[float], n_visual: int) -> Counts:
    """Ratios by layer as counts, for the layers where they fall."""
    found: dict[int, int] = {}
    left = n_visual
    for layer, ratio in enumerate(ratios):
        n = half_up(ratio, n_visual)
        if layer and n < left:
            found[layer] = left = n
    return found


def p_sigmoid(
    evaluate: Evaluate, study: optuna.Study, decoder: Decoder, n_visual: int, budget: float, trials: int, seed: int
) -> tuple[Counts, dict[str, float]]:
    """The most accurate sigmoid with the budget, by Bayesian optimisation, and its parameters; the first of equals.

    The first trial is FastV's single cut. Parameters that cannot meet the budget are pruned trials, which cost nothing.

    Args:
        evaluate: tells the trial its accuracy.
        study: resumes where it has trials already.
        decoder: the decoder layers.
        n_visual: visual tokens of the largest picture.
        budget: mean ratio of visual tokens left over all layers.
        trials: number of sigmoids to evaluate.
        seed: of the draws.

    Raises:
        RunError: no sigmoid can meet the budget.
    """
    if not study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.WAITING)):
        study.enqueue_trial({"steepness": STEEPNESS[1], "middle": decoder.scaled(2, PAPER_DEPTH) - 0.5})
    while len(finished := study.get_trials(deepcopy=False, states=FINISHED)) < 20 * trials:
        if sum(t.state == TrialState.COMPLETE for t in finished) >= trials:
            break
        # A journal does not hold the sampler's state. With one seed per trial, a resumed search draws the same.
        study.sampler = optuna.samplers.TPESampler(seed=zlib.crc32(f"{seed} {len(finished)}".encode()))
        trial = study.ask()
        steepness = trial.suggest_float("steepness", *STEEPNESS, log=True)
        middle = trial.suggest_float("middle", 0.0, float(decoder.n_layers))
        ratios = sigmoid_ratios(budget, decoder.n_layers, steepness, middle)
        if ratios is None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            evaluate(counts_of(ratios, n_visual), trial)
    complete = [t for t in finished if t.state == TrialState.COMPLETE][:trials]
    if not complete:
        raise RunError(
            f"no sigmoid has a mean of {budget:g} over {decoder.n_layers} layers, because the first layer keeps all "
            f"tokens; type --budget {2 / decoder.n_layers:.2g}, for instance"
        )
    best = max(complete, key=lambda t: t.values[0])
    return counts_of(sigmoid_ratios(budget, decoder.n_layers, **best.params) or (), n_visual), best.params
