"""Which of several processes this one is, read from the environment that torchrun, SLURM or a plain loop sets.

Process r takes the segments r, r + W, … independently of the others: no process group, no collectives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from moewh.warehouse.errors import UsageError

_NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""SLURM_STEP_NUM_TASKS, not SLURM_NTASKS: the latter is also set in a batch script that starts a single process."""


@dataclass(frozen=True)
class Process:
    """Process `rank` of `world`; `local` is its number on its machine and picks its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def share(self, segments: list[int]) -> list[int]:
        """Return the segments that this process has to write, in order."""
        return [number for number in segments if number % self.world == self.rank]


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, else SLURM's variables, else be the only process.

    Raises UsageError for inconsistent values.
    """
    for rank, world, local in _NAMES:
        if rank not in environment or world not in environment:
            continue
        try:
            process = Process(int(environment[rank]), int(environment[world]), int(environment.get(local, 0)))
        except ValueError:
            process = Process(0, 0)
        if not 0 <= process.rank < process.world:
            raise UsageError(
                f"{rank}={environment[rank]} and {world}={environment[world]} do not describe a process. "
                f"Unset both, or set {rank} to a number from 0 to {world} - 1."
            )
        return process
    return Process()
