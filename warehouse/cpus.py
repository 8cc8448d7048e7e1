"""How many CPUs this process may use, which is often fewer than the machine has.

In: the CPU affinity, the limits of the process's control groups, and a launcher's environment variables.
Out: one number, which sets the size of every thread pool.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moewh.warehouse.errors import UsageError

_OF_THIS_PROCESS = "SLURM_CPUS_PER_TASK"
_PROCESSES_HERE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_STEP = "SLURM_STEP_NUM_TASKS"
"""Set only in processes that srun starts; the next two are read only together with it."""
_STEP_PROCESSES_HERE = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")


def usable_cpus(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Return how many CPUs this process may use, at least 1.

    This is the minimum of the affinity, the control groups' quotas (rounded up) and SLURM_CPUS_PER_TASK. Without
    SLURM_CPUS_PER_TASK, the result is divided by the number of processes that torchrun, SLURM or Open MPI started on
    this machine. `root` is the folder that holds /proc and /sys. Raises UsageError if a launcher's variable is not a
    number.
    """
    cpus = min([_affinity(), *(max(1, math.ceil(quota)) for quota in _quotas(root))])
    if _OF_THIS_PROCESS in environment:
        return min(cpus, _number(environment, _OF_THIS_PROCESS))
    return max(1, cpus // _processes_here(environment))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes_here(environment: Mapping[str, str]) -> int:
    """Return the number of processes that the launcher started on this machine."""
    names = _PROCESSES_HERE + (_STEP_PROCESSES_HERE if _STEP in environment else ())
    return next((_number(environment, name) for name in names if name in environment), 1)


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return a count from the environment; for a SLURM list such as 4(x2),3, its largest entry."""
    try:
        return max(1, *(int(re.sub(r"\(x\d+\)$", "", part)) for part in environment[name].split(",")))
    except ValueError:
        raise UsageError(f"{name}={environment[name]} is not a number. Unset it, or set it to a number.") from None


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs that each control group of this process and its parents allow, where they set a limit.

    In a container, /proc may name the host's path although only the container's groups are mounted: missing groups
    are skipped.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, read = root / "sys/fs/cgroup", _quota_of_version_2
        elif "cpu" in controllers.split(","):
            top, read = root / "sys/fs/cgroup/cpu", _quota_of_version_1
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if (quota := read(folder)) is not None:
                yield quota
            if folder == top:
                break


def _quota_of_version_2(folder: Path) -> float | None:
    """Read `cpu.max`: microseconds of CPU time in each period, or the word max."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() else None


def _quota_of_version_1(folder: Path) -> float | None:
    """Read a quota and its period, both in microseconds; a quota of -1 means no limit."""
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _read(file: Path) -> str:
    """Return a file's text, or an empty string if there is no such file."""
    return file.read_text().strip() if file.is_file() else ""
