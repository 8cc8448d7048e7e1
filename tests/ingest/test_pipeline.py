"""The pipeline: several processes, memory that runs out, errors in any stage; always the same rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import pyarrow as pa
import pytest
import torch
from threadpoolctl import ThreadpoolController

from moewh.ingest import run as pipeline
from moewh.ingest.capture import forward
from moewh.ingest.capture.hooks import PendingRouting
from moewh.ingest.options import IngestOptions
from moewh.ingest.processes import Process, this_process
from moewh.ingest.prompts.vocabulary import vocabulary_texts
from moewh.ingest.record import Identity
from moewh.ingest.run import Progress, Summary, ingest
from moewh.ingest.workers import WRITERS, in_background
from moewh.ingest.write.rollups import one_blas_thread
from moewh.ingest.write.segment import Committed, write_segment
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from tests.support.models import save_model
from tests.support.opened import viewed
from tests.support.runs import contents, write_prompts

SEGMENT_ROWS = 1_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 100)


def run(
    warehouse: Path,
    model: Path,
    prompts: Path,
    progress: Progress | None = None,
    process: Process | None = None,
    **options: Any,
) -> Summary:
    chosen = IngestOptions(model=str(model), prompts=(str(prompts),), **{"segment_rows": SEGMENT_ROWS, **options})
    return ingest(chosen, Layout(warehouse), progress, process)


@dataclass(frozen=True)
class Whole:
    """A run by one process that nothing disturbs."""

    segments: int
    contents: dict[str, str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> Whole:
    warehouse = tmp_path_factory.mktemp("whole")
    planned = run(warehouse, model, prompts).segments
    assert planned > 4 + WRITERS  # so that an error in the fourth segment leaves some to be written
    return Whole(planned, contents(warehouse))


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> dict[str, str]:
    """The same in smaller batches, as a CPU runs it: nothing in the background."""
    warehouse = tmp_path_factory.mktemp("in_turn")
    run(warehouse, model, prompts, batch_tokens=200)
    return contents(warehouse)


def rows(warehouse: Path) -> dict[tuple[int, ...], float]:
    """{(token_id, layer, expert): weight}"""
    connection = viewed(Layout(warehouse))
    stored = connection.execute("select token_id, layer, expert, weight from routing").fetchall()
    return {(token, layer, expert): weight for token, layer, expert, weight in stored}


# ------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, Process(0, 1, 0)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Process(2, 4, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}, Process(3, 8, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Process(0, 1, 0)),
        ({"RANK": "0"}, Process(0, 1, 0)),
    ],
)
def test_process_is_read_from_the_environment(environment: Mapping[str, str], process: Process) -> None:
    assert this_process(environment) == process


@pytest.mark.parametrize("environment", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "4"}])
def test_senseless_environment_is_refused(environment: Mapping[str, str]) -> None:
    with pytest.raises(UsageError, match="do not describe a process"):
        this_process(environment)


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_any_world_add_up_to_the_same_files(
    world: int, tmp_path: Path, model: Path, prompts: Path, whole: Whole
) -> None:
    written = [
        len(run(tmp_path / "many", model, prompts, process=Process(rank, world)).written)
        for rank in reversed(range(world))
    ]
    assert sum(written) == whole.segments
    assert max(written) - min(written) <= 1
    assert contents(tmp_path / "many") == whole.contents


def test_another_world_size_completes_the_rest(tmp_path: Path, model: Path, prompts: Path, whole: Whole) -> None:
    for rank, world in ((1, 3), (0, 2), (0, 1)):
        run(tmp_path / "many", model, prompts, process=Process(rank, world))
    assert contents(tmp_path / "many") == whole.contents
    assert not list((tmp_path / "many" / ".staging" / "prompts").glob("*.parquet"))


def test_torchrun_with_one_process_killed_and_all_restarted(tmp_path: Path, model: Path, prompts: Path) -> None:
    segment_rows = 300  # many segments, so that the kill is in the middle of them
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--no-python", str(Path(sys.executable).with_name("moewh")), "ingest", "--model", str(model)]
    command += ["--prompts", str(prompts), "--segment-rows", str(segment_rows), "--warehouse", str(tmp_path / "many")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def committed() -> int:
        return len(list((tmp_path / "many").glob("segments/run_id=tiny*/segment=*")))

    deadline = time.monotonic() + 90
    while committed() < 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=True)
    while committed() < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    assert first.wait(60) != 0
    left = committed()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert "moewh[0]: " in again.stderr
    assert "moewh[1]: " in again.stderr

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    planned = run(tmp_path / "one", model, prompts, segment_rows=segment_rows).segments
    torch.set_num_threads(threads)
    assert 3 <= left < planned
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


# ------------------------------------------------------------------------------------------------------ memory


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> list[int]:
    """Make forward passes over more padded tokens than this run out of memory; return the sizes tried."""
    tried = []

    def short(real: Any) -> Any:
        def launch(loaded: Any, batch: Any, wanted: Any) -> Any:
            tried.append(batch.input_ids_BS.size)
            if batch.input_ids_BS.size > most_tokens:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            return real(loaded, batch, wanted)

        return launch

    for name in ("run_batch", "run_verified_batch"):
        monkeypatch.setattr(forward, name, short(getattr(forward, name)))
    return tried


def test_out_of_memory_halves_the_batch_and_keeps_the_rows(
    tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "quiet", model, prompts, segment_rows=10**6)
    tried = short_of_memory(monkeypatch, 1_000)
    run(tmp_path / "short", model, prompts, segment_rows=10**6)
    assert tried[0] > 1_000
    quiet, short = rows(tmp_path / "quiet"), rows(tmp_path / "short")
    assert quiet.keys() == short.keys()
    assert max(abs(quiet[key] - short[key]) for key in quiet) <= 1e-6


def test_size_that_failed_is_not_tried_again(
    tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = short_of_memory(monkeypatch, 400)
    run(tmp_path, model, prompts, segment_rows=6_000, batch_tokens=600)
    assert 1 <= sum(size > 400 for size in tried) <= 2


def test_prompt_too_large_even_alone_is_failed_and_the_rest_goes_on(
    tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 50)
    warnings: list[str] = []
    run(tmp_path, model, prompts, Progress(warn=warnings.append), segment_rows=10**6)
    connection = viewed(Layout(tmp_path))
    statuses = connection.execute(
        "select status, min(num_tokens), max(num_tokens) from prompts group by all"
    ).fetchall()
    assert {status: (least, most) for status, least, most in statuses} == {"ok": (10, 50), "failed": (51, 51)}
    failed = connection.execute("""
        select count(*) from routing join prompts using (run_id, segment, prompt_id) where status = 'failed'
    """)
    assert failed.fetchone() == (0,)
    assert all("does not fit in the device's memory even alone" in warning for warning in warnings)
    assert connection.execute("select count(*) from prompts where status = 'failed'").fetchone() == (len(warnings),)


# ------------------------------------------------------------------------------------------------------ errors


def test_background_threads_as_on_a_gpu_write_the_same_files(
    tmp_path: Path, model: Path, prompts: Path, in_turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not in_background(torch.device("cpu"))
    assert in_background(torch.device("cuda"))
    monkeypatch.setattr(pipeline, "in_background", lambda _: True)
    run(tmp_path / "beside", model, prompts, batch_tokens=200)
    assert contents(tmp_path / "beside") == in_turn


def test_in_the_background_segments_are_written_at_the_same_time(
    tmp_path: Path, model: Path, prompts: Path, in_turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, third = write_segment, Event()

    def first_after_third(layout: Layout, identity: Identity, number: int, *args: Any, **kwargs: Any) -> Committed:
        if number == 0:
            assert third.wait(60), "segment 2 is not written before segment 0"
        committed = real(layout, identity, number, *args, **kwargs)
        if number == WRITERS - 1:
            third.set()
        return committed

    monkeypatch.setattr(pipeline, "in_background", lambda _: True)
    monkeypatch.setattr("moewh.ingest.run.write_segment", first_after_third)
    run(tmp_path / "together", model, prompts, batch_tokens=200)
    assert contents(tmp_path / "together") == in_turn


def test_the_vocabulary_is_decoded_once_before_the_writers_share_it(
    tmp_path: Path, model: Path, prompts: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed has its vocabulary stored already, so nothing else asks for it before the writers."""
    run(tmp_path / "resumed", model, prompts, process=Process(0, 2))
    threads: list[str] = []
    real = vocabulary_texts

    def slow(*args: Any) -> pa.Array:
        threads.append(current_thread().name)
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(pipeline, "in_background", lambda _: True)
    monkeypatch.setattr(pipeline, "vocabulary_texts", slow)
    assert len(run(tmp_path / "resumed", model, prompts).written) >= WRITERS
    assert threads == [current_thread().name]
    assert contents(tmp_path / "resumed") == whole.contents


class _OnDevice:
    """An event that a GPU never reaches by itself: somebody must wait for it, and waiting for it is noted."""

    def __init__(self, waited: list[str]) -> None:
        self.waited = waited

    def synchronize(self) -> None:
        self.waited.append(current_thread().name)


def test_passes_run_ahead_of_the_device_by_a_bounded_number_of_batches(
    tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the passes wait for the device itself, which is not counted as waiting for the writer."""
    waited: list[str] = []
    batches: list[int] = []
    monkeypatch.setattr(pipeline, "in_background", lambda _: True)
    monkeypatch.setattr(PendingRouting, "arrivals", property(lambda _: [_OnDevice(waited)]))
    options = IngestOptions(model=str(model), prompts=(str(prompts),), batch_tokens=20)
    summary = ingest(options, Layout(tmp_path / "wh"), Progress(batch_done=batches.append))
    assert summary.segments == 1
    assert len(batches) > 2 * pipeline._BATCHES_AHEAD
    assert waited == [current_thread().name] * (len(batches) - pipeline._BATCHES_AHEAD)


def test_the_limit_of_products_to_one_thread_goes_with_the_last_writer() -> None:
    blas = ThreadpoolController().select(internal_api="openblas")

    def threads() -> set[int]:
        return {library["num_threads"] for library in blas.info()}

    with blas.limit(limits=2):
        before, first, second = threads(), one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        during = threads()
        second.__exit__(None, None, None)
        assert (before, during, threads()) == ({2}, {1}, {2})


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("stage", ["tokenise", "_collect", "write_segment"])
def test_error_in_any_stage_stops_the_run_and_keeps_whole_segments(
    stage: str,
    background: bool,
    *,
    tmp_path: Path,
    model: Path,
    prompts: Path,
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "in_background", lambda _: background)
    real, calls = getattr(pipeline, stage), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise MoewhError(f"{stage} broke")
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, stage, failing)
    with pytest.raises(MoewhError, match=f"{stage} broke"):
        run(tmp_path / "broken", model, prompts)
    done = len(list((tmp_path / "broken").glob("segments/run_id=tiny*/segment=*")))
    assert 1 <= done <= 3 + (WRITERS - 1 if background else 0)
    assert not list((tmp_path / "broken" / ".staging").glob("*.part"))
    monkeypatch.setattr(pipeline, stage, real)
    assert len(run(tmp_path / "broken", model, prompts).written) == whole.segments - done
    assert contents(tmp_path / "broken") == whole.contents
