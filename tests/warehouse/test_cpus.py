"""How many CPUs a process may use: affinity, control groups of both versions, launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.errors import UsageError

NOTHING: dict[str, str] = {}
ONE_LIMIT = {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "400000 100000"}


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on 16 of 64 CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def machine(folder: Path, files: Mapping[str, str]) -> Path:
    """A folder in place of /, with some files of /proc and /sys."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        (NOTHING, 16),
        ({"proc/self/cgroup": "0::/"}, 16),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 16),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "800000 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "25000 50000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "9900000 100000"}, 16),
        (ONE_LIMIT, 4),
        ({**ONE_LIMIT, "proc/self/cgroup": "0::/job/step"}, 4),
        ({**ONE_LIMIT, "proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/step/cpu.max": "200000 100000"}, 2),
        ({**ONE_LIMIT, "proc/self/cgroup": "0::/other"}, 16),
        (
            {
                "proc/self/cgroup": "12:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/a",
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us": "100000",
            },
            16,
        ),
    ],
)
def test_control_groups(files: Mapping[str, str], cpus: int, tmp_path: Path) -> None:
    assert usable_cpus({}, machine(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("environment", "cpus"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "5"}, 3),
        ({"LOCAL_WORLD_SIZE": "32"}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 16),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "16"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_STEP_NUM_TASKS": "10"}, 4),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "8"}, 4),
        ({"SLURM_CPUS_PER_TASK": "64"}, 16),
    ],
)
def test_processes_of_a_launch_share_the_machine(environment: Mapping[str, str], cpus: int, tmp_path: Path) -> None:
    assert usable_cpus(environment, tmp_path) == cpus


def test_quota_is_shared_too(tmp_path: Path) -> None:
    assert usable_cpus({"LOCAL_WORLD_SIZE": "2"}, machine(tmp_path, ONE_LIMIT)) == 2


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"])
def test_what_is_no_number_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{name}=many is not a number. Unset it"):
        usable_cpus({name: "many"}, tmp_path)


def test_system_without_affinity_or_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cpus({}, tmp_path) == 64


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process choose its CPUs")
def test_real_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from moewh.warehouse.cpus import usable_cpus; print(usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
