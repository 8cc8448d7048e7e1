"""A small ingest to disturb, and the server that forks its commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moewh.warehouse.files.layout import Layout
from tests.support import kept_file
from tests.support.faults import Job, Server, segments_of
from tests.support.trials import Trial


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(kept_file.made()) as running:
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


@pytest.fixture
def trial(server: Server, job: Job, undisturbed: Layout, tmp_path: Path) -> Trial:
    return Trial(server, job, undisturbed, tmp_path / "wh")
