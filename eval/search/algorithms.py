"""How a schedule is searched for, given what evaluates one: G-Search and P-Sigmoid (arXiv 2412.00556)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tokprune.core.errors import RunError
from tokprune.core.schedules import PAPER_DEPTH, Sigmoid, half_up
from tokprune.core.signals import Decoder

from .trials import Counts, Point

EVALUATIONS, TRIALS = 6, 30  # of a layer of G-Search; of P-Sigmoid
STEEPNESS = 0.25, 32.0  # from nearly a straight line to one cut
SLACK = 1e-9  # what floating point may lose between two equal accuracies
Evaluate = Callable[[Counts], Point]


# ---- G-Search


def fewest(most: int, holds: Callable[[int], bool], evaluations: int) -> int:
    """The smallest count that holds, 0 to `most`, which is known to hold; 0 is asked first, then bisected.

    Bisection is by ratio: 1 to 2 is as far as 50 to 100. It takes for granted that what holds for a count holds for
    larger ones; accuracy does not promise that, so a smaller count may hold that was not looked at.
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
    """From shallow to deep the fewest tokens from every layer on, while accuracy stays within the tolerance.

    Greedy: what the first layers spend of the tolerance, later ones do not have.

    Args:
        evaluate: of a schedule, {} for the bare model.
        n_layers: decoder layers.
        n_visual: visual tokens of the largest picture.
        tolerance: accuracy that may be lost, of 1.
        evaluations: of a layer, at most.
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
    """The control of G-Search: of all single cuts within the tolerance the one with the fewest tokens over all layers.

    Arguments as in `g_search`; the empty schedule where no cut holds.
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
    """What is left in every layer, r(l) = lo + (1 - lo) / (1 + exp(steepness (l - middle))), r(0) = 1.

    `lo` is solved so that the mean over all layers is the budget; None where it would be below 0.
    """
    sigmoid = Sigmoid(steepness, middle)
    falls = [sigmoid.fall(layer, n_layers) for layer in range(1, n_layers)]
    room = n_layers - 1 - sum(falls)
    lo = (budget * n_layers - 1 - sum(falls)) / room if room > 0 else -1.0
    return None if lo < 0 else [1.0, *(lo + (1 - lo) * fall for fall in falls)]


def counts_of(ratios: Sequence[float], n_visual: int) -> Counts:
    """Ratios by layer as counts, where they fall."""
    found: dict[int, int] = {}
    left = n_visual
    for layer, ratio in enumerate(ratios):
        n = half_up(ratio, n_visual)
        if layer and n < left:
            found[layer] = left = n
    return found


def p_sigmoid(
    evaluate: Evaluate, decoder: Decoder, n_visual: int, budget: float, trials: int, seed: int
) -> tuple[Counts, dict[str, float]]:
    """The sigmoid of a budget that answers best, by Bayesian optimisation, and its parameters; the first of equals.

    The first trial is FastV's single cut. What the budget does not reach is not evaluated and no trial.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({"steepness": STEEPNESS[1], "middle": decoder.scaled(2, PAPER_DEPTH) - 0.5})
    best: tuple[Point, Counts, dict[str, float]] | None = None
    evaluated = 0
    for _ in range(20 * trials):
        trial = study.ask()
        steepness = trial.suggest_float("steepness", *STEEPNESS, log=True)
        middle = trial.suggest_float("middle", 0.0, float(decoder.n_layers))
        ratios = sigmoid_ratios(budget, decoder.n_layers, steepness, middle)
        if ratios is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        counts = counts_of(ratios, n_visual)
        point = evaluate(counts)
        study.tell(trial, point.accuracy)
        if best is None or point.right > best[0].right:
            best = point, counts, {"steepness": steepness, "middle": middle}
        evaluated += 1
        if evaluated == trials:
            break
    if best is None:
        raise RunError(
            f"no sigmoid has a mean of {budget:g} over {decoder.n_layers} layers, of which the first keeps all; type "
            f"--budget {2 / decoder.n_layers:.2g}, for instance"
        )
    return best[1], best[2]
