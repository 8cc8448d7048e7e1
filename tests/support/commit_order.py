"""The order of fsync and rename: recorded by an ingest's own process or by strace, and checked."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest


def steps_of(record: Path) -> list[list[str]]:
    """The steps a child recorded: a function's name and its paths."""
    return [json.loads(line) for line in record.read_text().splitlines()]


def check_order(steps: list[list[str]]) -> int:
    """Every folder that becomes visible was synced file by file, then itself, then renamed, then its parent was.

    So was every single file. Returns how many there were.
    """
    commits = 0
    for place, (name, path, *rest) in enumerate(steps):
        if name != "rename" or "/.staging/" not in path or "/.staging/" in rest[0]:
            continue
        if rest[0].endswith(".part"):  # of what is not there, to see whether a rename is possible at all
            continue
        synced = [step[1] for step in steps[:place] if step[0] == "fsync"]
        opened = [step[1] for step in steps[:place] if step[0] in ("open", "parquet")]
        files = {file for file in opened if Path(file).parent == Path(path)} - {path}
        assert files or path in opened, f"{path} has no files"
        assert files <= set(synced), "a file was renamed into place before it was on the disk"
        assert path in synced, "a folder, or a file, was renamed into place before it was on the disk"
        assert synced.index(path) > max((synced.index(file) for file in files), default=-1)
        following = [step[1] for step in steps[place + 1 :] if step[0] == "fsync"]
        assert following[:1] == [str(Path(rest[0]).parent)], "the rename is not on the disk before what comes next"
        commits += 1
    return commits


def kernel_commits(command: list[str], root: Path, log: Path) -> int:
    """Run a command under strace and check the order of its calls; return how many folders it committed."""
    trace = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", "trace=openat,fsync,rename,renameat,renameat2"]
    done = subprocess.run([*trace, "-o", str(log), *command], capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    return check_order(strace_steps(log.read_text(), root))


def strace_steps(text: str, root: Path) -> list[list[str]]:
    """Turn strace's lines into steps: files opened to write, syncs and renames within the warehouse, in order.

    A call that another thread's interrupts is two lines; it is taken where it ends, with the arguments it began with.
    """
    steps = []
    begun: dict[str, str] = {}
    for line in text.splitlines():
        thread, _, call = line.partition(" ")
        if "<unfinished" in call:
            begun[thread] = call.partition("<unfinished")[0]
            continue
        if "resumed>" in call:
            call = begun.pop(thread, "") + call.partition("resumed>")[2]
        if str(root) not in call:
            continue
        if "openat(" in call and ("O_WRONLY" in call or "O_RDWR" in call):
            steps.append(["open", re.findall(r'"([^"]*)"', call)[0]])
        elif "fsync(" in call:
            steps.append(["fsync", re.findall(r"fsync\(\d+<([^>]*)>", call)[0]])
        elif "rename" in call and " = 0" in call:
            steps.append(["rename", *re.findall(r'"([^"]*)"', call)])
    return steps
