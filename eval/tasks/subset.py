"""Fixed subsets: seeded, stratified by kind of question, the same everywhere."""

from __future__ import annotations

import random
from fractions import Fraction

from .base import Sample

SUBSET_SIZE, SUBSET_SEED = 800, 0


def stratified(samples: list[Sample], n: int, seed: int = SUBSET_SEED) -> list[Sample]:
    """`n` samples, each kind by its share (largest remainder), in the order of the task.

    The draw depends on the samples' ids and the seed alone.
    """
    if n >= len(samples):
        return list(samples)
    kinds: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.id):
        kinds.setdefault(sample.kind, []).append(sample)
    exact = {kind: Fraction(len(group) * n, len(samples)) for kind, group in sorted(kinds.items())}
    counts = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: (counts[kind] - exact[kind], kind))
    for kind in by_remainder[: n - sum(counts.values())]:
        counts[kind] += 1
    chosen = set()
    for kind, group in kinds.items():
        # random.Random.random is the same in every release of Python; sample() need not be.
        draw = random.Random(f"{seed} {kind}")
        ranked = sorted((draw.random(), s.id) for s in group)
        chosen |= {sample_id for _, sample_id in ranked[: counts[kind]]}
    return [s for s in samples if s.id in chosen]
