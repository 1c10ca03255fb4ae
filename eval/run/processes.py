"""Several processes at one run: which of them this is, and where they wait for each other.

`torchrun --nproc_per_node 2 -m tokprune.eval compare ...` starts two, as does `accelerate launch --multi_gpu
--num_processes 2 -m tokprune.eval compare ...`, with or without GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

PATIENCE = timedelta(days=7)  # a process that is done waits for one with slower questions


@dataclass(frozen=True)
class Processes:
    """One of `n` processes.

    Args:
        index: 0 to n - 1; process 0 writes what there is one of.
        n: how many there are.
        state: accelerate's, None for a process alone.
    """

    index: int = 0
    n: int = 1
    state: Any = None

    @classmethod
    def started(cls) -> Processes:
        """Of the launcher that started this process; alone without one."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state)

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    @property
    def share(self) -> slice:
        """Every n-th of a list, from this process' own start."""
        return slice(self.index, None, self.n)

    def wait(self) -> None:
        """Until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def told(self, value: Any) -> Any:
        """What process 0 holds."""
        if self.state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def end(self) -> None:
        """Part from the others; nothing can be awaited afterwards."""
        if self.state is not None:
            self.wait()
            self.state.destroy_process_group()


def launched_alone() -> bool:
    """Whether accelerate's launcher started this process and no other, as `--cpu --num_processes 2` does."""
    return "WORLD_SIZE" not in os.environ and "ACCELERATE_DYNAMO_BACKEND" in os.environ
