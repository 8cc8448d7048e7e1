"""The long form of the fault tests: `make soak`, or `python -m tools.soak`. pytest does not collect it.

Each part repeats many times what tests.faults.test_faults and tests.warehouse.test_verify do a few times, and gives
rows of a table: what was done, how often, and how often something was lost, torn or not noticed. Any loss makes the
exit code 1. It takes forty minutes of one core, or a few minutes with
`--kills 10 --flips 50 --fuzz-seconds 10 --examples 20 --every 20`.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import duckdb
import pytest

from benchmarks.timing import machine
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.views.opening import open_warehouse
from tests.support import trials
from tests.support.commit_order import kernel_commits
from tests.support.damage import DAMAGES, committed_files, faults_of, sound_warehouse, twin
from tests.support.faults import ERRORS, Job, Server
from tests.support.trials import Trial

_READ = (*schema.TABLES, *schema.TOTALS)
FUZZED = {"prompts": 0.6, "manifests": 0.3, "pages": 0.1}
"""Targets of `tools.fuzz`, and the share of --fuzz-seconds of each."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    fault: str
    tried: str
    lost: int
    """How often something was lost, doubled, torn, silently wrong, or not found."""


@dataclass
class Soak:
    """State shared by the parts: the options, a folder, and an undisturbed run."""

    chosen: argparse.Namespace
    folder: Path
    server: Server

    @cached_property
    def random(self) -> random.Random:
        """The single random generator."""
        return random.Random(self.chosen.seed)

    @cached_property
    def _undisturbed(self) -> tuple[Job, Layout]:
        (self.folder / "job").mkdir()
        job = Job.make(self.folder / "job")
        return job, trials.undisturbed_run(self.server, job, self.folder / "undisturbed" / "wh")

    def trial(self) -> Trial:
        """Return a fresh warehouse to disturb."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        job, undisturbed = self._undisturbed
        return Trial(self.server, job, undisturbed, folder / "wh")


# ------------------------------------------------------------------------------------------ ingest disturbed


def kills(soak: Soak) -> Iterator[Row]:
    """Send SIGKILL anywhere in a run."""
    done = trials.kill_until_complete(soak.trial(), soak.chosen.kills, soak.chosen.seed)
    yield Row("SIGKILL at a random moment or system call of an ingest", f"{done} kills", 0)


def commits(soak: Soak) -> Iterator[Row]:
    """Send SIGKILL at every step of writing and committing a segment."""
    done, outcomes = trials.kill_last_segment(soak.trial(), soak.chosen.every)
    assert soak.chosen.every > 9 or outcomes == {True, False}, "the segment was there before it could be, or never"
    yield Row("SIGKILL at each system call of writing and committing a segment", f"{done} kills", 0)


def errors(soak: Soak) -> Iterator[Row]:
    """Raise each error at each step of writing a segment; then fill whole disks."""
    for error in ERRORS:
        trial, tried, ended = soak.trial(), 0, 0
        for step, _, _ in trials.last_segment_lost(trial, soak.chosen.every):
            ended += trials.fail_and_complete(trial, step, error)
            tried += 1
        what = f"{tried} errors, {ended} ended the command"
        yield Row(f"{error} at each system call of writing and committing a segment", what, 0)
    sizes = [f"size={size}k" for size in range(100, 600, 40)]
    inodes = [f"size=64m,nr_inodes={count}" for count in range(10, 90, 10)]
    committed = [trials.fill_then_make_room(soak.trial(), limit) for limit in sizes]
    what = f"{len(sizes)} sizes, {min(committed)} to {max(committed)} files committed before it was full"
    yield Row("a disk (tmpfs) that is full, then has room", what, 0)
    for limit in inodes:
        trials.fill_then_make_room(soak.trial(), limit)
    yield Row("an inode table that is full, then has room", f"{len(inodes)} sizes", 0)
    limits = range(1_000, 9_000, 1_000)
    for size in limits:
        trials.cannot_grow(soak.trial(), size)
    yield Row("files that cannot grow (RLIMIT_FSIZE)", f"{len(limits)} limits", 0)
    trials.fsync_fails(soak.trial())
    yield Row("every fsync fails", "1 ingest", 0)


def stops(soak: Soak) -> Iterator[Row]:
    """Send SIGINT and SIGTERM after some segments."""
    for number in (signal.SIGINT, signal.SIGTERM):
        for _ in range(soak.chosen.stops):
            trials.stop(soak.trial(), number, soak.random.randrange(1, 4))
        yield Row(f"{number.name} while ingesting", f"{soak.chosen.stops} signals", 0)


def writers(soak: Soak) -> Iterator[Row]:
    """Run eight processes at once, on the same run, on separate runs, and mixed, while others read."""
    for names, what in (("rrrrrrrr", "the same run"), ("abcdefgh", "a run each"), ("rrsssttr", "three runs")):
        reads = 0
        for _ in range(soak.chosen.rounds):
            reads += trials.ingest_at_once(soak.trial(), list(names), readers=2)
        tried = f"{soak.chosen.rounds} times, {reads} reads meanwhile"
        yield Row(f"8 writers at once, {what}; 2 readers", tried, 0)


def pauses(soak: Soak) -> Iterator[Row]:
    """Pause a command at each of its steps, and run another to its end meanwhile."""
    for paused, other in trials.AT_ONCE:
        done = trials.pause_at_steps(soak.trial(), paused, other, soak.chosen.pauses)
        yield Row(f"{paused} paused at its system calls, {other} meanwhile", f"{done} pauses", 0)


def order(soak: Soak) -> Iterator[Row]:
    """The order of fsync and rename in a whole ingest, as the kernel sees it."""
    if shutil.which("strace") is None:
        yield Row("order of fsync and rename (strace)", "0: strace is not installed", 0)
        return
    trial = soak.trial()
    command = [sys.executable, "-c", "from moewh.cli.main import main; main()"]
    command += trial.plan().arguments
    commits = kernel_commits(command, trial.root, trial.root.with_name("log"))
    yield Row("order of fsync and rename in an ingest, by strace", f"{commits} commits", 0)


# ------------------------------------------------------------------------------------------ files damaged


def answer(layout: Layout, table: str) -> object:
    """Return a digest of all that a plain query gives of a table; the message if it fails."""
    try:
        with open_warehouse(layout) as connection:
            return connection.execute(f"select count(*), sum(hash(t)::hugeint) from {table} as t").fetchall()
    except (duckdb.Error, UnicodeDecodeError) as error:
        return str(error)


OUTCOMES = ("failed naming it", "failed", "right", "wrong")


@dataclass
class Damaged:
    """Counts over many damaged files."""

    tried: int = 0
    missed: int = 0
    """Damage that verify did not find, or attributed to another file."""
    queries: Counter[str] = field(default_factory=Counter)
    """Outcomes of plain queries over the damaged tables: a count for each of OUTCOMES."""


class Sound:
    """A warehouse that is as committed, except during a trial: one run is sealed, one is not."""

    def __init__(self, soak: Soak) -> None:
        self.random = soak.random
        self.layout = sound_warehouse(Path(tempfile.mkdtemp(dir=soak.folder)))
        assert seal(self.layout, "two")
        self.files = {path: path.read_bytes() for path in committed_files(self.layout)}
        self.answers = {table.name: answer(self.layout, table.name) for table in _READ}

    def damage(self, path: Path, kind: str, counts: Damaged) -> None:
        """Damage one file, record who notices, and restore every file."""
        DAMAGES[kind](path, self.random)
        faults = faults_of(self.layout)
        counts.tried += 1
        counts.missed += path not in {fault.path for fault in faults} | {fault.folder / path.name for fault in faults}
        table = next((table.name for table in _READ if table.file == path.name), None)
        if table is not None:
            given = answer(self.layout, table)
            failed = "failed naming it" if str(path) in str(given) else "failed"
            right = given == self.answers[table]
            counts.queries["right" if right else failed if isinstance(given, str) else "wrong"] += 1
        for file, content in self.files.items():
            if not file.is_file() or file.read_bytes() != content:
                file.write_bytes(content)


def damage(soak: Soak) -> Iterator[Row]:
    """Damage every file in every way except a flipped bit."""
    sound = Sound(soak)
    for kind in (name for name in DAMAGES if name != "flip"):
        counts = Damaged()
        for path, content in sound.files.items():
            if kind != "swap" or content != sound.files.get(twin(path), content):
                sound.damage(path, kind, counts)
        yield _damage_row(f"{kind.replace('_', ' ')}, each file of each table", counts)
    assert faults_of(sound.layout) == []


def flips(soak: Soak) -> Iterator[Row]:
    """Flip bits, in the files of every table in turn."""
    sound, counts = Sound(soak), Damaged()
    files = list(sound.files)
    for number in range(soak.chosen.flips):
        sound.damage(files[number % len(files)], "flip", counts)
    yield _damage_row(f"one bit flipped, in turn in {len(files)} files of every table", counts)
    assert faults_of(sound.layout) == []


def _damage_row(fault: str, counts: Damaged) -> Row:
    queries = ", ".join(f"{counts.queries[kind]} {kind}" for kind in OUTCOMES)
    return Row(f"{fault}: found by verify", f"{counts.tried} (plain queries: {queries})", counts.missed)


# ------------------------------------------------------------------------------------------ hostile input


def properties(soak: Soak) -> Iterator[Row]:
    """Run the property-based tests with many examples."""
    environment = {**os.environ, "MOEWH_EXAMPLES": str(soak.chosen.examples)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/faults/test_hostile.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-3_000:]
    tried = f"{passed[1] if passed else 0} tests, {soak.chosen.examples} examples of each property"
    yield Row("hostile prompts, labels, run ids, parameters, SQL (hypothesis)", tried, 0)


def fuzz(soak: Soak) -> Iterator[Row]:
    """Fuzz the readers of files, guided by coverage."""
    if find_spec("atheris") is None:
        yield Row("fuzzing", "0: atheris is not installed (it comes with the extra `soak`)", 0)
        return
    for target, share in FUZZED.items():
        seconds = max(1, round(soak.chosen.fuzz_seconds * share))
        command = [sys.executable, "-m", "tools.fuzz", target, str(seconds)]
        done = subprocess.run(command, capture_output=True, check=False)
        log = done.stderr.decode(errors="replace")
        units = re.search(r"number_of_executed_units:\s*(\d+)", log)
        covered = re.findall(r"cov: (\d+)", log)
        assert done.returncode == 0, f"{target}:\n{done.stdout.decode(errors='replace')[-3_000:]}\n{log[-3_000:]}"
        tried = f"{int(units[1]) if units else 0:,} inputs in {seconds} s, {covered[-1] if covered else '?'} branches"
        yield Row(f"fuzzing of {target} (atheris)", tried, 0)


# ------------------------------------------------------------------------------------------ all of it

PARTS: dict[str, Callable[[Soak], Iterator[Row]]] = {
    part.__name__: part
    for part in (errors, kills, commits, stops, writers, pauses, order, damage, flips, properties, fuzz)
}


def run(soak: Soak, parts: list[str]) -> list[Row]:
    """Run the parts one after another, printing each row as it comes; a failure ends its part, not the others."""
    rows = []
    for name in parts:
        began = time.monotonic()
        try:
            for row in PARTS[name](soak):
                rows.append(row)
                print(f"{time.monotonic() - began:7.0f} s  {line(row)}", flush=True)
        except (Exception, pytest.skip.Exception) as error:
            traceback.print_exc()
            first = (str(error).strip() or repr(error)).splitlines()[0]
            skipped = isinstance(error, pytest.skip.Exception)
            rows.append(Row(name, f"{'skipped' if skipped else 'ended'}: {first}", 0 if skipped else 1))
    return rows


def line(row: Row) -> str:
    """Return a row of the Markdown table."""
    return f"| {row.fault} | {row.tried} | {row.lost} |"


def main() -> None:
    """Run the chosen parts, print the table, and write it to --results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=1_000)
    parser.add_argument("--fuzz-seconds", type=int, default=600)
    parser.add_argument("--examples", type=int, default=100, help="examples per property")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of eight writers")
    parser.add_argument("--stops", type=int, default=10, help="stops per signal")
    parser.add_argument("--pauses", type=int, help="pauses per pair of commands (default: one per step)")
    parser.add_argument("--every", type=int, default=1, help="test every Nth step of a commit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, help="write the table to this file")
    parser.add_argument("--append", action="store_true", help="append to the file, after the results of other parts")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moewh-soak-") as folder, Server() as server:
        rows = run(Soak(chosen, Path(folder), server), chosen.parts)
    lost = sum(row.lost for row in rows)
    table = "\n".join(["| fault | tried | lost |", "|---|---|---|", *map(line, rows)])
    minutes = (time.monotonic() - began) / 60
    command = f"`python -m {' '.join(['tools.soak', *sys.argv[1:]])}`, {minutes:.0f} minutes; {machine()}"
    text = f"{command}\n\n{table}\n\nLost, torn, wrong or not found: {lost}.\n"
    print(f"\n{text}")
    if chosen.results is not None:
        chosen.results.parent.mkdir(parents=True, exist_ok=True)
        before = chosen.results.read_text() if chosen.append and chosen.results.is_file() else "# Soak\n"
        chosen.results.write_text(f"{before}\n{text}")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
