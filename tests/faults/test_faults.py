"""Faults: killed, failed, full, stopped, concurrent — nothing committed is lost, doubled or torn.

These are short forms; `make soak` runs the long ones and prints the figures in docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest

from moewh.warehouse.answer.shell import find_duckdb
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import FOLDERS
from moewh.warehouse.views.publishing import publish
from tests.support.commit_order import check_order, kernel_commits, steps_of
from tests.support.damage import faults_of
from tests.support.faults import ERRORS, FaultPlan, Server, segments_of
from tests.support.runs import contents
from tests.support.trials import (
    AT_ONCE,
    Reader,
    Trial,
    cannot_grow,
    expected_rows,
    fail_and_complete,
    fill_then_make_room,
    fsync_fails,
    ingest_at_once,
    kill_last_segment,
    kill_until_complete,
    log_of,
    pause_at_steps,
    stop,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, unshare and strace as Linux has them")
KILLS = 10
FAILURES = 6


# ------------------------------------------------------------------------------------------ killed


def test_killed_at_any_step_or_moment(trial: Trial) -> None:
    kills = kill_until_complete(trial, KILLS, seed=1)
    print(f"{kills} kills, 0 segments lost or torn")


def test_killed_at_every_step_of_a_commit(trial: Trial) -> None:
    kills, outcomes = kill_last_segment(trial, every=13)
    assert outcomes == {True, False}, "it is there whole, or not at all"
    print(f"{kills} kills while a segment was committed, 0 segments lost or torn")


@pytest.mark.parametrize(("mutation", "first"), [("no staging", 300), ("no manifest", 440)])
def test_kills_show_a_commit_that_is_none(mutation: str, first: int, trial: Trial) -> None:
    with pytest.raises(AssertionError, match="not whole"):
        for step in range(first, len(steps_of(log_of(trial.undisturbed))), 17):
            shutil.rmtree(trial.root, ignore_errors=True)
            assert trial.ingest(kill_at=step, mutation=mutation)["code"] in (0, -signal.SIGKILL)
            trial.check_committed(set())


# ------------------------------------------------------------------------------------------ the disk refuses


def test_an_error_at_any_step(trial: Trial) -> None:
    failed = 0
    for number, step in enumerate(trial.different_steps(FAILURES, random.Random(2))):
        one = replace(trial, root=trial.root.with_name(str(number)))
        failed += fail_and_complete(one, step, ERRORS[number % len(ERRORS)])
    assert failed > FAILURES / 2
    print(f"{FAILURES} errors, {failed} ended the command, 0 segments lost")


def test_an_fsync_that_fails_ends_the_command(trial: Trial) -> None:
    fsync_fails(trial)


def test_an_ignored_error_of_fsync_is_noticed(trial: Trial) -> None:
    with pytest.raises(AssertionError):
        fsync_fails(trial, "errors of fsync ignored")


@pytest.mark.parametrize("size", [1_000, 3_000, 5_000])
def test_a_file_that_cannot_grow(size: int, trial: Trial) -> None:
    cannot_grow(trial, size)


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
    writing = [["refresh", *at], ["runs", "--delete", "r", "--yes", *at]]
    refused = server.run("read-only", commands=writing, root=str(root), copy_of=str(undisturbed.root))
    for code, said in refused["result"]:
        assert (code, f"cannot write the warehouse at {root}: Read-only file system" in said) == (1, True), said
    spilling = {"commands": commands[:1], "root": str(root), "copy_of": str(undisturbed.root)}
    mutated = server.run("read-only", **spilling, mutation="spill into the warehouse")
    assert mutated["result"][0][0] == 1, "a query that writes into the warehouse is noticed"


def test_a_file_system_without_locks(trial: Trial) -> None:
    assert trial.ingest(kill_at=300, mutation="no locks")["code"] == -signal.SIGKILL
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
    """The zero-row files go through the same commit as every segment; `make soak` checks a whole ingest."""
    root = tmp_path / "wh"
    imports = "from pathlib import Path; from moewh.warehouse.files.layout import Layout"
    code = f"{imports}; Layout(Path({str(root)!r})).create()"
    assert kernel_commits([sys.executable, "-c", code], root, tmp_path / "log") == len(FOLDERS) + 1  # and `unsealed`


# ------------------------------------------------------------------------------------------ all at once


@pytest.mark.parametrize("names", ["rr", "rrsssttr"], ids=["two", "eight"])
def test_processes_at_once(names: str, trial: Trial) -> None:
    reads = ingest_at_once(trial, list(names))
    assert reads > 0
    print(f"{len(names)} writers, {reads} reads, 0 of them torn")


@pytest.mark.parametrize("mutation", ["no staging, slowly", "a lost race is an error"])
def test_processes_at_once_show_a_commit_that_is_none(mutation: str, trial: Trial) -> None:
    with pytest.raises(AssertionError):
        ingest_at_once(trial, ["r", "r"], mutation)


@pytest.mark.parametrize(("paused", "other"), AT_ONCE)
def test_a_command_runs_between_two_steps_of_another(paused: str, other: str, trial: Trial) -> None:
    pauses = 7 if paused == "refused" else 3  # at every other step of the former, which has few
    assert pause_at_steps(trial, paused, other, pauses) >= pauses / 2


def test_a_command_that_does_not_wait_is_noticed(trial: Trial) -> None:
    with pytest.raises(AssertionError, match=r"No such file|is missing|which does not exist"):
        pause_at_steps(trial, "delete", "ingest", None, mutation="no locks")


def test_the_reader_notices_torn_segments(undisturbed: Layout, tmp_path: Path) -> None:
    reader = Reader(tmp_path / "wh", expected_rows(undisturbed, ["r"]))
    shutil.copytree(undisturbed.root, tmp_path / "wh", symlinks=True)
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
    """Start a DuckDB shell on the published file, with the warehouse's path."""
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
    """Write SQL to a shell and return the first line of its output."""
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.write(f"{sql}\n")
    return shell.stdout.readline().strip()


@pytest.mark.parametrize("options", [["-readonly"], []], ids=["read-only", "read-write"])
def test_a_shell_may_hold_the_file(options: list[str], trial: Trial) -> None:
    """moewh ingests, refreshes and queries while a shell has warehouse.duckdb open."""
    shutil.copytree(trial.undisturbed.root, trial.root, symlinks=True)
    layout = Layout(trial.root)
    at = ["--warehouse", str(layout.root)]
    with start_shell(layout, *options) as shell:
        assert ask(shell, "select count(*) from runs;") == "1"
        second = trial.job.arguments(layout.root, "--run-id", "second")
        for command in (second, ["refresh", *at], ["query", "expert_load", *at]):
            outcome = trial.server.moewh(FaultPlan(command, str(layout.root)))
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
    shutil.copytree(undisturbed.root, tmp_path / "wh", symlinks=True)
    kill_a_shell_and_publish(Layout(tmp_path / "wh"))
    unlink = Path.unlink
    keep = lambda path, **named: None if path.suffix == ".wal" else unlink(path, **named)  # noqa: E731
    monkeypatch.setattr(Path, "unlink", keep)
    with pytest.raises((AssertionError, duckdb.Error)):
        kill_a_shell_and_publish(Layout(tmp_path / "wh"))


# ------------------------------------------------------------------------------------------ told to stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(number: signal.Signals, trial: Trial) -> None:
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
        outcome = odd.server.moewh(FaultPlan([*arguments, "--warehouse", str(odd.root)], str(odd.root)))
        assert outcome["code"] == 0, outcome["stderr"]
    odd.check_complete()
