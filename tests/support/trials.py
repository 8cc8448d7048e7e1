"""An ingest disturbed and then completed: what `tests.faults.test_faults` does a few times and `tools.soak` many times.

Each function does one kind of harm to a `Trial`, and asserts that nothing committed was lost, doubled or torn.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import unseal
from moewh.warehouse.views.opening import open_warehouse
from tests.support.commit_order import steps_of
from tests.support.damage import faults_of, flip
from tests.support.faults import FaultPlan, Job, Server, segments_of
from tests.support.runs import contents


def undisturbed_run(server: Server, job: Job, root: Path) -> Layout:
    """Run the ingest that others are compared with, and record its steps beside the warehouse."""
    layout = Layout(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    assert server.moewh(job.plan(root, "--run-id", "r", record=str(log_of(layout))))["code"] == 0
    return layout


def log_of(undisturbed: Layout) -> Path:
    """The file with the steps of an undisturbed run."""
    return undisturbed.root.with_name("steps")


@dataclass(frozen=True)
class Trial:
    """A warehouse to disturb, what disturbs it, and what it must come to in the end."""

    server: Server
    job: Job
    undisturbed: Layout
    root: Path

    def ingest(self, **faults: Any) -> dict[str, Any]:
        """Run the ingest command to its end, or to the fault's."""
        return self.server.moewh(self.plan(**faults))

    def plan(self, **faults: Any) -> FaultPlan:
        """The ingest command with its faults."""
        return self.job.plan(self.root, "--run-id", "r", **faults)

    def different_steps(self, count: int, rng: random.Random) -> list[int]:
        """Return so many steps of an undisturbed run, in order: each of another kind, as far as there are so many.

        A kind is a function in a kind of folder, such as `fsync` in a segment's staging folder. Two thirds of all steps
        make an empty warehouse, but only a third of the kinds do.
        """
        kinds: dict[tuple[str, str], list[int]] = {}
        for number, (name, path, *_) in enumerate(steps_of(log_of(self.undisturbed)), start=1):
            folder = "/".join(Path(path).relative_to(self.undisturbed.root).parts[:2])
            kinds.setdefault((name, re.sub(r"[0-9a-f]{12,}|\d+", "#", folder)), []).append(number)
        found = list(kinds.values())
        return [rng.choice(found[number * len(found) // count]) for number in range(count)]

    def check_committed(self, before: set[Path]) -> set[Path]:
        """What is committed has only grown, and every byte of it is what an undisturbed run writes."""
        after = segments_of(self.root)
        assert before <= after, "a committed segment is gone"
        for segment in after:
            names = {path.name for path in (self.root / segment).iterdir()}
            expected = {path.name for path in (self.undisturbed.root / segment).iterdir()}
            assert names == expected, "a segment is not whole"
        assert contents(self.root).items() <= contents(self.undisturbed.root).items(), "a file is not what it should be"
        return after

    def check_complete(self) -> None:
        """The run is what an undisturbed one is, verified, with nothing left over."""
        assert contents(self.root) == contents(self.undisturbed.root)
        assert faults_of(Layout(self.root)) == []
        staging = self.root / ".staging"
        assert {path.name for path in staging.iterdir()} <= {"empty", "prompts"}
        assert [path.suffix for path in (staging / "prompts").iterdir()] == [".json"]


def kill_until_complete(trial: Trial, kills: int, seed: int) -> int:
    """Kill ingest at a step, and what resumes it at a moment, then let it complete; return the number of kills."""
    rng = random.Random(seed)
    began = time.monotonic()
    assert trial.ingest()["code"] == 0
    whole = time.monotonic() - began  # later moments would kill nothing
    steps = itertools.cycle(trial.different_steps(-(-kills // 2), rng))
    done = 0
    while done < kills:
        shutil.rmtree(trial.root)
        assert trial.ingest(kill_at=next(steps))["code"] == -signal.SIGKILL
        committed = trial.check_committed(set())
        pid = trial.server.start("moewh", **vars(trial.plan()))
        time.sleep(rng.uniform(0.1, 1) * whole)
        os.kill(pid, signal.SIGKILL)
        killed = trial.server.wait(pid)["code"] == -signal.SIGKILL
        committed = trial.check_committed(committed)
        if killed:
            assert trial.ingest()["code"] == 0
            trial.check_committed(committed)
        trial.check_complete()
        done += 1 + killed
    return done


def last_segment_lost(trial: Trial, every: int) -> Iterator[tuple[int, Path, set[Path]]]:
    """Yield every so many steps of writing a run's last segment, and the last, with the warehouse as it was before.

    That is: the step, the segment and those before it.
    """
    half = trial.root.with_name("half")
    shutil.copytree(trial.undisturbed.root, half, symlinks=True)
    unseal(Layout(half), "r")
    last = max(segments_of(half), key=lambda path: int(path.name.removeprefix("segment=")))
    shutil.rmtree(half / last)
    shutil.copytree(half, trial.root, symlinks=True)
    steps = trial.ingest()["result"]
    for step in sorted({*range(1, steps + 1, every), steps}):
        shutil.rmtree(trial.root)
        shutil.copytree(half, trial.root, symlinks=True)
        yield step, last, segments_of(half)
    shutil.rmtree(half)


def kill_last_segment(trial: Trial, every: int) -> tuple[int, set[bool]]:
    """Kill the writing of a run's last segment at every so many steps; return the kills, and if it was there after."""
    outcomes = []
    for step, last, before in last_segment_lost(trial, every):
        assert trial.ingest(kill_at=step)["code"] == -signal.SIGKILL
        outcomes.append(last in trial.check_committed(before))
    return len(outcomes), set(outcomes)


def fail_and_complete(trial: Trial, step: int, error: str) -> bool:
    """Fail one step: what was committed is whole and readable, and the same command completes it.

    Returns whether the step ended the command.
    """
    outcome = trial.ingest(fail_at=step, error=error)
    committed = trial.check_committed(set())
    if outcome["code"]:
        line = outcome["stderr"].splitlines()[-1]
        assert (outcome["code"], line.startswith("moewh: ")) == (1, True), outcome["stderr"]
        assert str(trial.root) in line
    if committed:
        with open_warehouse(Layout(trial.root)) as connection:
            rows = connection.execute("select count(distinct segment) from routing").fetchall()
        assert rows == [(len(committed),)]
    assert trial.ingest()["code"] == 0
    Layout(trial.root).sweep()  # as verify does, and an ingest with work to do: what failed may be the cleaning up
    trial.check_complete()
    return bool(outcome["code"] == 1)


def fsync_fails(trial: Trial, mutation: str | None = None) -> None:
    """Fail every fsync: what may not be on the disk is not committed."""
    outcome = trial.ingest(fail_every="fsync", mutation=mutation)
    assert (outcome["code"], str(trial.root) in outcome["stderr"]) == (1, True), outcome["stderr"]
    assert segments_of(trial.root) == set()
    assert trial.ingest()["code"] == 0
    trial.check_complete()


def cannot_grow(trial: Trial, size: int, mutation: str | None = None) -> None:
    """Let no file get larger than so many bytes, then let it."""
    outcome = trial.ingest(file_size=size, mutation=mutation)
    assert (outcome["code"], str(trial.root) in outcome["stderr"]) == (1, True), outcome["stderr"]
    trial.check_committed(set())
    assert trial.ingest()["code"] == 0
    trial.check_complete()


def fill_then_make_room(trial: Trial, limit: str, mutation: str | None = None) -> int:
    """Ingest on a disk of limited size, which then grows; return how many files were committed before it did."""
    root = trial.root.with_name("mount") / "wh"
    asked = {"arguments": trial.job.arguments(root, "--run-id", "r"), "root": str(root), "mutation": mutation}
    outcome = trial.server.run("small disk", **asked, first=limit, then="size=64m,nr_inodes=100000")
    if outcome["result"] is None and ("unshare" in outcome["stderr"] or "mount" in outcome["stderr"]):
        pytest.skip(f"no file system of its own: {outcome['stderr']}")
    result = outcome["result"]
    assert result is not None, outcome["stderr"]
    assert result["codes"] == [1, 0], result["said"]
    assert f"cannot write the warehouse at {root}: " in result["said"][0]
    assert "No space left on device" in result["said"][0]
    expected = contents(trial.undisturbed.root)
    assert result["committed"][0].items() <= expected.items()
    assert result["committed"][1] == expected
    assert result["faults"] == []
    return len(result["committed"][0])


class Reader(threading.Thread):
    """Queries a warehouse until told to stop; every answer must be of whole segments, and segments never go away."""

    QUERY = """
        select run_id, segment, count(*), count(distinct token_id), round(sum(weight), 3)
        from routing group by all
    """

    def __init__(self, root: Path, expected: dict[tuple[str, int], tuple[Any, ...]]) -> None:
        super().__init__(daemon=True)
        self.root, self.expected = root, expected
        self.reads, self.wrong = 0, list[str]()
        self.stop = threading.Event()

    def run(self) -> None:
        """Query again and again; an error is a wrong answer too."""
        seen: set[tuple[str, int]] = set()
        while not self.stop.is_set():
            if not Layout(self.root).exists():
                continue
            try:
                with open_warehouse(Layout(self.root)) as connection:
                    rows = {(row[0], row[1]): row[2:] for row in connection.execute(self.QUERY).fetchall()}
            except Exception as error:
                self.wrong.append(str(error))
                continue
            self.wrong += [f"{key}: {row}" for key, row in rows.items() if self.expected.get(key) != row]
            self.wrong += [f"{folder} is not whole" for folder in torn_segments(Layout(self.root))]
            self.wrong += [f"{key} went away" for key in seen - rows.keys()]
            seen = set(rows)
            self.reads += 1


def torn_segments(layout: Layout) -> list[Path]:
    """Return the folders of segments that lack a file: a rename of the whole folder never shows one."""
    needed = {"manifest.json", *(t.file for t in schema.TABLES if t.level == "segment" and not t.opt_in)}
    folders = layout.root.glob("segments/run_id=*/segment=*")
    return [folder for folder in folders if not needed <= {path.name for path in folder.iterdir()}]


def expected_rows(layout: Layout, names: list[str]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What the reader may see of each segment, for runs of these names with the undisturbed run's rows."""
    with open_warehouse(layout) as connection:
        rows = connection.execute(Reader.QUERY).fetchall()
    return {(name, row[1]): row[2:] for name in names for row in rows}


def ingest_at_once(trial: Trial, names: list[str], mutation: str | None = None, readers: int = 1) -> int:
    """Start one ingest for each name at the same time, with readers; every run must be the undisturbed one.

    Returns how often was read.
    """
    expected = expected_rows(trial.undisturbed, sorted(set(names)))
    reading = [Reader(trial.root, expected) for _ in range(readers)]
    for reader in reading:
        reader.start()
    plans = [trial.job.plan(trial.root, "--run-id", name, mutation=mutation, read=True) for name in names]
    children = [trial.server.start("moewh", **vars(plan)) for plan in plans]
    outcomes = [trial.server.wait(pid) for pid in children]
    for reader in reading:
        reader.stop.set()
        reader.join()
    assert [outcome["code"] for outcome in outcomes] == [0] * len(names), [outcome["stderr"] for outcome in outcomes]
    assert [wrong for reader in reading for wrong in reader.wrong] == []
    for name in set(names):
        assert segment_digests(trial.root, name) == segment_digests(trial.undisturbed.root, "r")
    assert faults_of(Layout(trial.root)) == []
    return sum(reader.reads for reader in reading)


AT_ONCE = [
    *(("ingest", "ingest"), ("ingest", "delete"), ("delete", "ingest"), ("delete", "delete")),
    *(("refused", "ingest"), ("ingest", "another")),
    *(("delete", "seal"), ("seal", "delete"), ("repair", "repair"), ("geometry", "geometry"), ("geometry", "delete")),
]
"""Commands that are paused, each with one that runs meanwhile."""
_EXPLAINED = {
    "delete": ("there is no run 'r'", "run 'r' was deleted by another command meanwhile"),
    "repair": (": 1 fault",),
    "refused": ("has a 'text' that is not a string",),
    "another": ("run 'r' exists and is another run", "run 'r' is another run now"),
}
"""What commands, or those that run beside them, may end with."""


def pause_at_steps(trial: Trial, paused: str, other: str, steps: int | None, mutation: str | None = None) -> int:
    """Pause one command at some of its steps, or at all, and run another meanwhile; return the number of pauses.

    Each time, both end well, or with a message that explains why not, and the warehouse is sound.
    """
    plans = {name: replace(plan, mutation=mutation) for name, plan in _commands(trial).items()}
    half = trial.root.with_name("half")
    shutil.copytree(trial.undisturbed.root, half, symlinks=True)
    if "geometry" not in (paused, other):
        unseal(Layout(half), "r")
    if "ingest" in (paused, other):
        shutil.rmtree(Layout(half).segment("r", 1))
    if "repair" in (paused, other):
        flip(Layout(half).segment("r", 1) / schema.ROUTING.file, random.Random(0))
    if {"refused", "another"} & {paused, other}:
        shutil.rmtree(half)
        half.mkdir()
    shutil.copytree(half, trial.root, symlinks=True)
    count = trial.server.moewh(plans[paused])["result"]
    chosen = range(1, count + 1, 1 if steps is None else -(-count // steps))
    explained = (*_EXPLAINED.get(paused, ()), *_EXPLAINED.get(other, ()))
    for step in chosen:
        shutil.rmtree(trial.root, ignore_errors=True)
        shutil.copytree(half, trial.root, symlinks=True)
        for outcome in _between_steps(trial.server, replace(plans[paused], pause_at=step), plans[other]):
            said = outcome["stderr"].splitlines()[-1] if outcome["code"] else ""
            assert outcome["code"] == 0 or any(one in said for one in explained), (step, outcome["stderr"])
        assert faults_of(Layout(trial.root)) == [], step
        folders = {path.relative_to(trial.root).parts[0] for path in trial.root.glob("[!.]*/run_id=r")}
        assert not folders or "runs" in folders, (step, "a deleted run left something", folders)
    return len(chosen)


def _commands(trial: Trial) -> dict[str, FaultPlan]:
    at = ["--warehouse", str(trial.root)]
    words = {
        "delete": ["runs", "--delete", "r", "--yes"],
        "seal": ["seal"],
        "repair": ["verify", "--repair"],
        "geometry": ["geometry", "--run", "r", "--model", str(trial.job.folder / "tiny")],
    }
    plans = {name: FaultPlan([*command, *at], str(trial.root)) for name, command in words.items()}
    wrong = trial.root.with_name("wrong.jsonl")
    wrong.write_text('{"text": "a"}\n{"text": 3}\n')
    refused = [str(wrong) if word.endswith("p.jsonl") else word for word in trial.plan().arguments]
    another = [*trial.plan().arguments, "--domain", "another"]
    of_words = {"refused": FaultPlan(refused, str(trial.root)), "another": FaultPlan(another, str(trial.root))}
    return {"ingest": trial.plan(), **of_words, **plans}


def _between_steps(server: Server, paused: FaultPlan, other: FaultPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pause one command at its step `pause_at` until another has ended or waits for it; return both outcomes."""
    first = server.start("moewh", **vars(paused))
    while _state(first)[0] not in "TZ":
        time.sleep(0.005)
    second = server.start("moewh", **vars(other))
    seen, since = _state(second), time.monotonic()
    while seen[0] != "Z" and not (seen[0] == "S" and time.monotonic() - since > 0.5):
        time.sleep(0.01)
        if (now := _state(second)) != seen:
            seen, since = now, time.monotonic()
    os.kill(first, signal.SIGCONT)
    return server.wait(first), server.wait(second)


def _state(pid: int) -> tuple[str, str]:
    """Return the state of a process, such as `T` (stopped), `Z` (ended) or `S` (waiting), and its CPU time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], "+".join(fields[11:13])


def segment_digests(root: Path, name: str) -> dict[str, str]:
    """Digest of each file of a run's segments, by its path below the run."""
    place = f"segments/run_id={name}/"
    return {path.removeprefix(place): digest for path, digest in contents(root).items() if path.startswith(place)}


def stop(trial: Trial, number: signal.Signals, segments: int, mutation: str | None = None) -> None:
    """Signal an ingest once so many segments are committed: it says what it did, and the same command goes on.

    On a busy machine, an ingest may end before the signal is sent: then it is tried again.
    """
    for _ in range(3):
        shutil.rmtree(trial.root, ignore_errors=True)
        pid = trial.server.start("moewh", **vars(trial.plan(mutation=mutation)))
        deadline = time.monotonic() + 60
        while len(segments_of(trial.root)) < segments and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, number)
        outcome = trial.server.wait(pid)
        if outcome["code"]:
            break
    assert outcome["code"] == 128 + number, outcome["stderr"]
    assert len(trial.check_committed(set())) >= segments
    assert outcome["stderr"].splitlines()[-1] == (
        "moewh: stopped; committed segments are kept. Run the same command again to continue."
    )
    assert not list((trial.root / ".staging").glob("*.part"))
    assert trial.ingest()["code"] == 0
    trial.check_complete()
