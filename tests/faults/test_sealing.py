"""Sealing, unsealing and deleting, killed at many of their steps: no answer counts a segment twice or not at all."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing import merge
from moewh.warehouse.sealing import seal as sealing
from moewh.warehouse.sealing.seal import seal, unseal
from moewh.warehouse.views import merged
from moewh.warehouse.views.opening import open_warehouse
from tests.support.damage import faults_of, flip
from tests.support.faults import FaultPlan
from tests.support.opened import viewed
from tests.support.runs import contents
from tests.support.trials import Trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux has them")
PAUSE = 0.25
"""The value outside the tests."""
SUM = "select run_id, sum(tokens) as tokens from expert_counts group by run_id"
Counts = dict[str, dict[str, int]]
MERGED = [table for table in schema.MERGED if not table.opt_in]
"""The rollups of every run; `tests/ingest/test_expert_outputs.py` covers the others."""


def counts(layout: Layout) -> Counts:
    """Return the totals of every table of counts, by table and run."""
    with viewed(layout) as connection:
        return {
            table.name: dict(
                connection.execute(f"select run_id, sum({_counted(table)}) from {table.name} group by 1").fetchall()
            )
            for table in MERGED
        }


def _counted(table: schema.Table) -> str:
    return "pairs" if table is schema.REPETITION_COUNTS else "tokens"


def counted_by_segment(layout: Layout, run_id: str) -> dict[str, int]:
    """Return the totals over the existing segments' files, read without any view."""
    totals = {}
    for table in MERGED:
        files = [str(path) for path in layout.segments(run_id).glob(f"segment=*/{table.file}")]
        if files:
            sql = f"select sum({_counted(table)}) from read_parquet({files})"
            ((total,),) = duckdb.execute(sql).fetchall()
            totals[table.name] = total
    return totals


def copies(trial: Trial, start: Layout, plan: FaultPlan, every: int = 1) -> Iterator[None]:
    """Yield once per step of a command, with the warehouse as a kill at that step leaves it."""
    shutil.copytree(start.root, trial.root, symlinks=True)
    steps = trial.server.moewh(plan)["result"]
    for step in range(1, steps + 1, every):
        shutil.rmtree(trial.root)
        shutil.copytree(start.root, trial.root, symlinks=True)
        outcome = trial.server.moewh(FaultPlan(plan.arguments, plan.root, kill_at=step))
        assert outcome["code"] == -signal.SIGKILL, outcome
        yield


@pytest.fixture
def two_runs(trial: Trial, tmp_path: Path) -> Layout:
    """The undisturbed run, and another beside it."""
    layout = Layout(tmp_path / "two")
    shutil.copytree(trial.undisturbed.root, layout.root, symlinks=True)
    assert trial.server.moewh(trial.job.plan(layout.root, "--run-id", "s"))["code"] == 0
    return layout


def test_sealing_killed_at_its_steps(trial: Trial, tmp_path: Path) -> None:
    start = Layout(tmp_path / "start")
    shutil.copytree(trial.undisturbed.root, start.root, symlinks=True)
    unseal(start, "r")
    expected = counts(start)
    assert expected == counts(trial.undisturbed)
    plan = FaultPlan(["seal", "--warehouse", str(trial.root)], str(trial.root))
    sealed = set()
    for _ in copies(trial, start, plan, every=8):
        layout = Layout(trial.root)
        sealed.add(layout.sealed("r").is_dir())
        assert counts(layout) == expected
        assert faults_of(layout) == []
        assert trial.server.moewh(plan)["code"] == 0
        assert contents(trial.root) == contents(trial.undisturbed.root)
        assert not layout.unsealed("r").exists()
    assert sealed == {True, False}


def test_taking_a_segment_out_killed_at_its_steps(trial: Trial, tmp_path: Path) -> None:
    start = Layout(tmp_path / "start")
    shutil.copytree(trial.undisturbed.root, start.root, symlinks=True)
    flip(start.segment("r", 1) / schema.ROUTING.file, random.Random(0))
    plan = FaultPlan(["verify", "--repair", "--warehouse", str(trial.root)], str(trial.root))
    there = set()
    for _ in copies(trial, start, plan, every=14):
        layout = Layout(trial.root)
        there.add(layout.segment("r", 1).is_dir())
        found = counts(layout)
        assert {name: runs["r"] for name, runs in found.items()} == counted_by_segment(layout, "r")
        trial.server.moewh(plan)
        assert trial.ingest()["code"] == 0
        shutil.rmtree(trial.root / "quarantine")
        assert contents(trial.root) == contents(trial.undisturbed.root)
        assert layout.sealed("r").is_dir()
    assert there == {True, False}


def test_deleting_killed_at_its_steps(trial: Trial, two_runs: Layout) -> None:
    plan = FaultPlan(["runs", "--delete", "r", "--yes", "--warehouse", str(trial.root)], str(trial.root))
    whole = counts(two_runs)
    seen = set()
    for _ in copies(trial, two_runs, plan, every=10):
        layout = Layout(trial.root)
        for name, runs in counts(layout).items():
            assert runs["s"] == whole[name]["s"]
            assert runs.get("r") in (None, whole[name]["r"])
        seen.add("r" in counts(layout)["expert_counts"])
        again = trial.server.moewh(plan)
        assert again["code"] == 0 or "there is no run 'r'" in again["stderr"]
        assert counts(layout) == {name: {"s": runs["s"]} for name, runs in whole.items()}
        assert list(layout.root.rglob("run_id=r")) == []
    assert seen == {True, False}


@pytest.mark.parametrize(
    "guard", ["", "anti join sealed_before using (run_id)"], ids=["as it is", "both places counted"]
)
def test_readers_while_runs_are_sealed_and_unsealed(
    guard: str, trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every result is right, or a transient error; without its guard, some are wrong."""
    layout = Layout(tmp_path / "wh")
    shutil.copytree(trial.undisturbed.root, layout.root, symlinks=True)
    expected = counts(layout)["expert_counts"]
    monkeypatch.setattr(sealing, "PAUSE", PAUSE)
    real = merged.merged_select
    unguarded = "moewh.warehouse.views.base.merged_select"
    monkeypatch.setattr(unguarded, lambda *given: real(*given).replace(guard or "\0", "", 1))
    stop, wrong, right = threading.Event(), list[str](), list[str]()

    def read() -> None:
        with open_warehouse(layout) as connection:
            while not stop.wait(0.01):
                try:
                    rows = dict(connection.execute(SUM).fetchall())
                except duckdb.Error as error:
                    if not any(said in str(error) for said in (merged.ASK_AGAIN, "No such file", " lacks ")):
                        wrong.append(str(error))
                else:
                    (right if rows == expected else wrong).append(str(rows))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(4):
        unseal(layout, "r")
        assert seal(layout, "r")
        if guard and wrong and right:  # seen
            break
    stop.set()
    for reader in readers:
        reader.join()
    assert right
    assert bool(wrong) == bool(guard), wrong[:3]


def test_queries_while_runs_are_sealed_and_unsealed(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command retries, so every result is right."""
    monkeypatch.setattr(sealing, "PAUSE", PAUSE)
    layout = Layout(tmp_path / "wh")
    shutil.copytree(trial.undisturbed.root, layout.root, symlinks=True)
    stop = threading.Event()

    def move() -> None:
        while not stop.wait(1.5):
            unseal(layout, "r")
            assert seal(layout, "r")

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(6):
            result = CliRunner().invoke(main, ["query", "-c", SUM, "--format", "csv", "--warehouse", str(layout.root)])
            assert (result.exit_code, result.stdout) == (0, "run_id,tokens\nr,2904\n"), result.output
    finally:
        stop.set()
        mover.join()


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_when_one_table_fails_or_is_interrupted_the_others_stop(
    kind: type[BaseException], trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path / "wh")
    shutil.copytree(trial.undisturbed.root, layout.root, symlinks=True)
    unseal(layout, "r")
    begun = threading.Event()

    def endless(*_: object) -> Iterator[pa.Table]:
        while True:
            begun.set()
            yield schema.sealed(schema.AFFINITY_COUNTS).arrow().empty_table()
            time.sleep(0.01)

    def failing(*_: object) -> Iterator[pa.Table]:
        assert begun.wait(60)
        if kind is OSError:
            raise OSError(errno.ENOSPC, "No space left on device")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        yield from endless()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.setattr(merge, "usable_cpus", lambda: len(MERGED))
    monkeypatch.setattr(merge, "merged_affinity", endless)
    monkeypatch.setattr(merge, "_merged", failing)
    try:
        with pytest.raises(MoewhError if kind is OSError else kind):
            seal(layout, "r")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not layout.sealed("r").exists()
    assert counts(layout) == counts(trial.undisturbed)
    monkeypatch.undo()
    assert seal(layout, "r")


@pytest.mark.parametrize("table", [*MERGED, *schema.TOTALS], ids=lambda table: table.name)
def test_a_sealed_set_without_a_file_is_reported_and_rebuilt(table: schema.Table, trial: Trial, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    shutil.copytree(trial.undisturbed.root, layout.root, symlinks=True)
    (layout.sealed("r") / table.file).unlink()
    with (
        open_warehouse(layout) as connection,
        pytest.raises(duckdb.Error, match=f"run r is sealed and lacks {table.file}"),
    ):
        connection.execute(f"select count(*) from {table.name}").fetchall()
    plan = FaultPlan(["verify", "--repair", "--warehouse", str(layout.root)], str(layout.root))
    assert trial.server.moewh(plan)["code"] == 1
    assert counts(layout) == counts(trial.undisturbed)
    assert layout.sealed("r").is_dir()
