"""What holds for every test: no network, one thread, files in memory; and which test files run first.

Threads that wait for each other make tiny models slow. Under xdist a file's tests run in one process, which builds once
what they share; so do the tests of the files in TOGETHER.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.sealing import seal

if TYPE_CHECKING:
    from tests.support.faults import Server

MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
    # A disk takes longer over the many small files than we do. Set TMPDIR to keep what the tests write.
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="moewh-tests.", dir=MEMORY)
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
seal.PAUSE = 0.0  # hundreds of tests ingest; those of sealing itself set it again
pytest.register_assert_rewrite("tests.support")  # its assertions show values when they fail, as a test's do
WAITING = {"test_faults.py", "test_sealing.py"}
READING = {"test_prompts.py"}
"""Whose reads each start a DuckDB of their own, as users' do. Those of `test_prompt_files.py` are too many for that."""
TOGETHER = {
    "every family": {"ingest/test_families.py", "test_families_page.py", "ingest/test_inspect.py"},
    "one ingest disturbed": {"faults/test_faults.py", "faults/test_sealing.py", "faults/test_expert_outputs.py"},
}
"""Files whose tests one process runs."""
LONGEST = (
    *("warehouse/test_spark.py", "faults/test_faults.py", "ingest/test_families.py", "faults/test_sealing.py"),
    *(
        "ingest/test_generation_settings.py",
        "ingest/test_pipeline.py",
        "warehouse/test_jail.py",
        "warehouse/test_remote.py",
    ),
    *("warehouse/test_publish.py", "warehouse/test_paths.py", "ingest/test_prompt_files.py", "warehouse/test_shell.py"),
    *("ingest/test_record.py", "queries/test_unknown.py", "ingest/test_traces.py", "warehouse/test_parameters.py"),
    *("warehouse/test_formats.py", "ingest/test_weights.py", "warehouse/test_verify.py", "ingest/test_rollups.py"),
    *("warehouse/test_links.py", "test_documents.py", "cli/test_report.py", "ingest/test_trace_documents.py"),
    *("faults/test_publishing.py", "ingest/test_adapters.py", "ingest/test_chats.py", "ingest/test_ingest.py"),
    *("warehouse/test_check.py", "warehouse/test_opening.py", "cli/test_cli.py", "ingest/test_light_start.py"),
)
"""The slowest files. They start first, so that no process is left alone with one of them at the end."""


def pytest_xdist_auto_num_workers() -> int:
    """Run one process more than there are cores: some tests wait. Each further one imports torch once more."""
    return usable_cpus() + 1


@pytest.fixture(autouse=True, scope="module")
def nothing_is_waited_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write without waiting for the disk, and seal without waiting for readers: nobody pulls a plug or reads here.

    The tests that kill processes wait as users do; so does every process that a test starts, except that those of the
    fork server seal without waiting where nobody reads. New warehouses are
    copies of one empty one, and so is `warehouse.duckdb` where no test reads it.
    """
    from tests.support.database_file import copy_one_file
    from tests.support.empty_warehouse import copy_one_empty_warehouse
    from tests.support.shared_database import share_one_database

    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in WAITING:
            patch.setattr(os, "fsync", os.fstat)  # which still fails for a descriptor that is not open
            patch.setattr(seal, "PAUSE", 0)
            copy_one_empty_warehouse(patch)
            if request.path.name not in READING:
                share_one_database(patch)
        if request.node.get_closest_marker("published_file") is None:
            copy_one_file(patch)
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """What forks commands, started when a test first asks for it."""
    from tests.support.database_file import made
    from tests.support.faults import Server

    with Server(made()) as running:
        yield running


def pytest_configure(config: pytest.Config) -> None:
    """Register our marker."""
    config.addinivalue_line("markers", "published_file: a module whose tests read `warehouse.duckdb`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    tests = Path(__file__).parent
    order = {tests / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Hide the modules that every test imports from the garbage collector, which would traverse torch repeatedly.

    And have it look less often at what tests leave: that took a twentieth of their time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)
    atexit.register(gc.unfreeze)  # DuckDB reports what is not freed in the end


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole files in the order of their tests, and some together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # which would start the files of most tests first
    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope

    def together(test: str) -> str:
        file: str = file_of(test)
        return next((scope for scope, names in TOGETHER.items() if file.removeprefix("tests/") in names), file)

    scheduler._split_scope = together
    return scheduler
