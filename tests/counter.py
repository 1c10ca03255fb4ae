"""What torch's own flop counter sees, part by part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    """Fused attention of the CPU, which the counter does not know; keys may be shared by query heads."""
    return sdpa_flop_count(q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


MAPPING = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


@torch.no_grad()
def counted(run: Callable[[], object], parts: tuple[str, ...] = ()) -> dict[str, int]:
    """FLOPs of a call: of modules whose name ends in one of `parts`, and of everything as "all"."""
    with FlopCounterMode(display=False, depth=None, custom_mapping=MAPPING) as counter:
        run()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    found = {part: sum(n for name, n in by_module.items() if ("." + name).endswith("." + part)) for part in parts}
    return {**found, "all": counter.get_total_flops()}


@contextlib.contextmanager
def sizes_made():
    """Elements of every tensor that is made in the block."""
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        yield sizes
