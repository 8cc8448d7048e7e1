"""Faults: killed, failed, full, told to stop, all at once — nothing committed is lost, doubled or torn.

Short forms; `make soak` runs the long ones and prints the figures that docs/reliability.md states.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moewh.warehouse.answer.shell import find_duckdb
from moewh.warehouse.files.layout import FOLDERS, Layout
from moewh.warehouse.views.base import open_warehouse
from moewh.warehouse.views.publishing import publish
from tests.ingest.test_ingest import contents
from tests.support.damage import faults_of
from tests.support.faults import ERRORS, Job, Plan, Server, segments_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, unshare and strace as Linux has them")
KILLS = 20
FAILURES = 10
STEPS = 390
"""About how many steps an undisturbed run takes; a kill beyond the last does nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(server: Server, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    root = tmp_path_factory.mktemp("undisturbed") / "wh"
    assert server.moewh(job.plan(root, "--run-id", "r"))["code"] == 0
    assert len(segments_of(root)) >= 5
    return Layout(root)


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

    def plan(self, **faults: Any) -> Plan:
        """The ingest command with its faults."""
        return self.job.plan(self.root, "--run-id", "r", **faults)

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


@pytest.fixture
def trial(server: Server, job: Job, undisturbed: Layout, tmp_path: Path) -> Trial:
    return Trial(server, job, undisturbed, tmp_path / "wh")


# ------------------------------------------------------------------------------------------ killed


def kill_until_complete(trial: Trial, kills: int, seed: int) -> int:
    """Kill ingest again and again, at steps and at moments in turn; return how many kills there were."""
    rng = random.Random(seed)
    done, committed = 0, set[Path]()
    while done < kills:
        if done % 2:
            outcome = trial.ingest(kill_at=rng.randrange(1, STEPS))
        else:
            pid = trial.server.start("moewh", **vars(trial.plan()))
            time.sleep(rng.uniform(0.1, 1.2))
            os.kill(pid, signal.SIGKILL)
            outcome = trial.server.wait(pid)
        killed = outcome["code"] == -signal.SIGKILL
        done += killed
        committed = trial.check_committed(committed)
        if not killed:
            trial.check_complete()
            shutil.rmtree(trial.root)
            committed = set()
    assert trial.ingest()["code"] == 0
    trial.check_committed(committed)
    trial.check_complete()
    return done


def test_killed_at_any_step_or_moment(trial: Trial) -> None:
    kills = kill_until_complete(trial, KILLS, seed=1)
    print(f"{kills} kills, 0 segments lost or torn")


def last_segment_lost(trial: Trial, every: int) -> Iterator[tuple[int, Path, set[Path]]]:
    """Yield every so many steps of writing a run's last segment, with the warehouse as it was before them.

    That is: the step, the segment and those before it.
    """
    half = trial.root.with_name("half")
    shutil.copytree(trial.undisturbed.root, half)
    last = max(segments_of(half), key=lambda path: int(path.name.removeprefix("segment=")))
    shutil.rmtree(half / last)
    shutil.copytree(half, trial.root)
    steps = trial.ingest()["result"]
    for step in range(1, steps + 1, every):
        shutil.rmtree(trial.root)
        shutil.copytree(half, trial.root)
        yield step, last, segments_of(half)
    shutil.rmtree(half)


def kill_last_segment(trial: Trial, every: int) -> tuple[int, set[bool]]:
    """Kill the writing of a run's last segment at every so many steps; return the kills, and if it was there after."""
    outcomes = []
    for step, last, before in last_segment_lost(trial, every):
        assert trial.ingest(kill_at=step)["code"] == -signal.SIGKILL
        outcomes.append(last in trial.check_committed(before))
    return len(outcomes), set(outcomes)


def test_killed_at_every_step_of_a_commit(trial: Trial) -> None:
    kills, outcomes = kill_last_segment(trial, every=9)
    assert outcomes == {True, False}, "it is there whole, or not at all"
    print(f"{kills} kills while a segment was committed, 0 segments lost or torn")


@pytest.mark.parametrize("mutation", ["no staging", "no manifest"])
def test_kills_show_a_commit_that_is_none(mutation: str, trial: Trial) -> None:
    with pytest.raises(AssertionError, match="not whole"):
        for step in range(160, STEPS, 17):
            shutil.rmtree(trial.root, ignore_errors=True)
            assert trial.ingest(kill_at=step, mutation=mutation)["code"] in (0, -signal.SIGKILL)
            trial.check_committed(set())


# ------------------------------------------------------------------------------------------ the disk refuses


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


def test_an_error_at_any_step(trial: Trial) -> None:
    rng = random.Random(2)
    failed = 0
    for number in range(FAILURES):
        one = replace(trial, root=trial.root.with_name(str(number)))
        failed += fail_and_complete(one, rng.randrange(1, STEPS), ERRORS[number % len(ERRORS)])
    assert failed > FAILURES / 2
    print(f"{FAILURES} errors, {failed} ended the command, 0 segments lost")


def fsync_fails(trial: Trial, mutation: str | None = None) -> None:
    """Fail every fsync: what may not be on the disk is not committed."""
    outcome = trial.ingest(fail_every="fsync", mutation=mutation)
    assert (outcome["code"], str(trial.root) in outcome["stderr"]) == (1, True), outcome["stderr"]
    assert segments_of(trial.root) == set()
    assert trial.ingest()["code"] == 0
    trial.check_complete()


def test_an_fsync_that_fails_ends_the_command(trial: Trial) -> None:
    fsync_fails(trial)


def test_an_ignored_error_of_fsync_is_noticed(trial: Trial) -> None:
    with pytest.raises(AssertionError):
        fsync_fails(trial, "errors of fsync ignored")


def cannot_grow(trial: Trial, size: int, mutation: str | None = None) -> None:
    """Let no file get larger than so many bytes, then let it."""
    outcome = trial.ingest(file_size=size, mutation=mutation)
    assert (outcome["code"], str(trial.root) in outcome["stderr"]) == (1, True), outcome["stderr"]
    trial.check_committed(set())
    assert trial.ingest()["code"] == 0
    trial.check_complete()


@pytest.mark.parametrize("size", [1_000, 3_000, 5_000])
def test_a_file_that_cannot_grow(size: int, trial: Trial) -> None:
    cannot_grow(trial, size)


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


FULL = ["size=520k", "size=64m,nr_inodes=75"]


@pytest.mark.parametrize("limit", FULL, ids=["disk", "inodes"])
def test_a_full_disk_then_room(limit: str, trial: Trial) -> None:
    assert 0 < fill_then_make_room(trial, limit) < len(contents(trial.undisturbed.root))


def test_errors_that_are_not_explained_are_noticed(trial: Trial) -> None:
    with pytest.raises(AssertionError):
        fill_then_make_room(trial, FULL[0], "errors not explained")
    with pytest.raises(AssertionError):
        cannot_grow(trial, 3_000, "errors not explained")


def test_a_read_only_warehouse_answers(server: Server, undisturbed: Layout, tmp_path: Path) -> None:
    root = tmp_path / "mount" / "wh"
    at = ["--warehouse", str(root)]
    commands = [
        ["query", "expert_load", "--format", "csv", *at],
        ["check", *at],
        ["runs", *at],
        ["verify", *at],
        ["query", "-c", "select count(*) from (select md5(range::varchar) m from range(300000) order by m)", *at],
    ]
    outcome = server.run("read-only", commands=commands, root=str(root), copy_of=str(undisturbed.root))
    if outcome["result"] is None:
        pytest.skip(f"no file system of its own: {outcome['stderr']}")
    assert [code for code, _ in outcome["result"]] == [0] * len(commands), outcome["result"]
    refused = server.run("read-only", commands=[["refresh", *at]], root=str(root), copy_of=str(undisturbed.root))
    ((code, said),) = refused["result"]
    assert (code, "Read-only file system" in said) == (1, True), said
    spilling = {"commands": commands[:1], "root": str(root), "copy_of": str(undisturbed.root)}
    mutated = server.run("read-only", **spilling, mutation="spill into the warehouse")
    assert mutated["result"][0][0] == 1, "a query that writes into the warehouse is noticed"


def test_a_file_system_without_locks(trial: Trial) -> None:
    assert trial.ingest(kill_at=STEPS // 2, mutation="no locks")["code"] == -signal.SIGKILL
    outcome = trial.ingest(mutation="no locks")
    assert outcome["code"] == 0, outcome["stderr"]
    assert contents(trial.root) == contents(trial.undisturbed.root)
    assert faults_of(Layout(trial.root)) == []


def test_a_stopped_clock(trial: Trial) -> None:
    outcome = trial.ingest(stopped_clock=True)
    assert outcome["code"] == 0, outcome["stderr"]
    trial.check_complete()


def test_a_clock_that_is_trusted_is_noticed(trial: Trial) -> None:
    assert trial.ingest(stopped_clock=True, mutation="the clock is trusted")["code"] != 0


# ------------------------------------------------------------------------------------------ order of fsync and rename


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


def test_order_of_fsync_and_rename(trial: Trial, tmp_path: Path) -> None:
    assert trial.ingest(record=str(tmp_path / "steps"))["code"] == 0
    commits = check_order(steps_of(tmp_path / "steps"))
    assert commits >= len(segments_of(trial.undisturbed.root)) + 1, "every segment, and the run's own files"


@pytest.mark.parametrize("mutation", ["no fsync", "no fsync of folders", "rename first"])
def test_the_order_is_looked_at(mutation: str, trial: Trial, tmp_path: Path) -> None:
    assert trial.ingest(record=str(tmp_path / "steps"), mutation=mutation)["code"] == 0
    with pytest.raises(AssertionError):
        check_order(steps_of(tmp_path / "steps"))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_order_as_the_kernel_sees_it(tmp_path: Path) -> None:
    """The zero-row files go through the same commit as every segment; `make soak` looks at a whole ingest."""
    root = tmp_path / "wh"
    code = f"from pathlib import Path; from moewh.warehouse.files.layout import Layout; Layout(Path({str(root)!r})).create()"
    assert kernel_commits([sys.executable, "-c", code], root, tmp_path / "log") == len(FOLDERS)


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


# ------------------------------------------------------------------------------------------ all at once


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
            self.wrong += [f"{key} went away" for key in seen - rows.keys()]
            seen = set(rows)
            self.reads += 1


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
    plans = [trial.job.plan(trial.root, "--run-id", name, mutation=mutation) for name in names]
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


def segment_digests(root: Path, name: str) -> dict[str, str]:
    """Digest of each file of a run's segments, by its path below the run."""
    place = f"segments/run_id={name}/"
    return {path.removeprefix(place): digest for path, digest in contents(root).items() if path.startswith(place)}


@pytest.mark.parametrize("names", ["rr", "rrsssttr"], ids=["two", "eight"])
def test_processes_at_once(names: str, trial: Trial) -> None:
    reads = ingest_at_once(trial, list(names))
    assert reads > 0
    print(f"{len(names)} writers, {reads} reads, 0 of them torn")


@pytest.mark.parametrize("mutation", ["no staging", "a lost race is an error"])
def test_processes_at_once_show_a_commit_that_is_none(mutation: str, trial: Trial) -> None:
    with pytest.raises(AssertionError):
        ingest_at_once(trial, ["r", "r"], mutation)


def test_the_reader_notices_torn_segments(undisturbed: Layout, tmp_path: Path) -> None:
    reader = Reader(tmp_path / "wh", expected_rows(undisturbed, ["r"]))
    shutil.copytree(undisturbed.root, tmp_path / "wh")
    layout = Layout(tmp_path / "wh")
    shutil.copyfile(layout.segment("r", 1) / "routing.parquet", layout.segment("r", 0) / "routing.parquet")
    reader.start()
    while not reader.reads:
        time.sleep(0.01)
    reader.stop.set()
    reader.join()
    assert reader.wrong


# ------------------------------------------------------------------------------------------ a shell holds the file


def start_shell(layout: Layout, *options: str) -> subprocess.Popen[str]:
    """Start a DuckDB shell on the published file, told where the warehouse is."""
    shell = subprocess.Popen(
        [find_duckdb(), *options, "-csv", "-noheader", str(layout.database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,  # the program on the PATH may start the real one, which is to be killed with it
    )
    assert ask(shell, f"set variable moewh_root = '{layout.root}'; select 1;") == "1"
    return shell


def ask(shell: subprocess.Popen[str], sql: str) -> str:
    """Write SQL to a shell and return the first line of its answer."""
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.write(f"{sql}\n")
    return shell.stdout.readline().strip()


@pytest.mark.parametrize("options", [["-readonly"], []], ids=["read-only", "read-write"])
def test_a_shell_may_hold_the_file(options: list[str], trial: Trial) -> None:
    """moewh ingests, refreshes and queries under a shell that has warehouse.duckdb open."""
    shutil.copytree(trial.undisturbed.root, trial.root)
    layout = Layout(trial.root)
    at = ["--warehouse", str(layout.root)]
    with start_shell(layout, *options) as shell:
        assert ask(shell, "select count(*) from runs;") == "1"
        second = trial.job.arguments(layout.root, "--run-id", "second")
        for command in (second, ["refresh", *at], ["query", "expert_load", *at]):
            outcome = trial.server.moewh(Plan(command, str(layout.root)))
            assert outcome["code"] == 0, outcome["stderr"]
        assert ask(shell, "select count(*) from runs;") == "2", "the shell sees the new run through the views it has"
        assert shell.stdin is not None
        shell.stdin.close()
        assert shell.wait(timeout=30) == 0


def kill_a_shell_and_publish(layout: Layout) -> None:
    """A shell killed with a write pending leaves a .wal, which DuckDB would replay over the next file."""
    log = layout.database.with_name(f"{layout.database.name}.wal")
    with start_shell(layout) as shell:
        assert ask(shell, "create or replace view runs as select 'hostile' as run_id; select 1;") == "1"
        os.killpg(shell.pid, signal.SIGKILL)
        assert shell.stdout is not None
        assert shell.stdout.read() == "", "nobody has the other end any more"
    assert log.is_file()
    publish(layout)
    with duckdb.connect(str(layout.database), read_only=True) as connection:
        connection.execute(f"set variable moewh_root = '{layout.root}'")
        assert connection.execute("select run_id from runs").fetchall() == [("r",)]
    assert not log.exists()


def test_a_killed_shells_log_does_not_come_back(
    undisturbed: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed.root, tmp_path / "wh")
    kill_a_shell_and_publish(Layout(tmp_path / "wh"))
    unlink = Path.unlink
    keep = lambda path, **named: None if path.suffix == ".wal" else unlink(path, **named)  # noqa: E731
    monkeypatch.setattr(Path, "unlink", keep)
    with pytest.raises((AssertionError, duckdb.Error)):
        kill_a_shell_and_publish(Layout(tmp_path / "wh"))


# ------------------------------------------------------------------------------------------ told to stop


def stop(trial: Trial, number: signal.Signals, segments: int, mutation: str | None = None) -> None:
    """Signal an ingest once so many segments are committed: it says what it did, and the same command goes on."""
    pid = trial.server.start("moewh", **vars(trial.plan(mutation=mutation)))
    deadline = time.monotonic() + 60
    while len(segments_of(trial.root)) < segments and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, number)
    outcome = trial.server.wait(pid)
    assert outcome["code"] == 128 + number, outcome["stderr"]
    assert len(trial.check_committed(set())) >= segments
    assert outcome["stderr"].splitlines()[-1] == (
        "moewh: stopped; what is committed is kept. Run the same command again to go on from there."
    )
    assert not list((trial.root / ".staging").glob("*.part"))
    assert trial.ingest()["code"] == 0
    trial.check_complete()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(number: signal.Signals, trial: Trial) -> None:
    stop(trial, number, 2)


def test_an_ingest_that_is_deaf_to_signals_is_noticed(trial: Trial) -> None:
    with pytest.raises(AssertionError):
        stop(trial, signal.SIGTERM, 2, "deaf to signals")


# ------------------------------------------------------------------------------------------ odd places


@pytest.mark.parametrize("name", ["a b'c\"d", "[x]*?", "ünï日本"])
def test_a_warehouse_at_an_odd_place(name: str, trial: Trial, tmp_path: Path) -> None:
    odd = replace(trial, root=tmp_path / name)
    assert odd.ingest()["code"] == 0
    for arguments in (["refresh"], ["query", "expert_load"], ["verify"]):
        outcome = odd.server.moewh(Plan([*arguments, "--warehouse", str(odd.root)], str(odd.root)))
        assert outcome["code"] == 0, outcome["stderr"]
    odd.check_complete()
