"""A small ingest to disturb, once per process."""

from __future__ import annotations

from pathlib import Path

import pytest

from moewh.warehouse.files.layout import Layout
from tests.support.faults import Job, Server, segments_of
from tests.support.trials import Trial, undisturbed_run


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def undisturbed(server: Server, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = undisturbed_run(server, job, tmp_path_factory.mktemp("undisturbed") / "wh")
    assert len(segments_of(layout.root)) == 3
    return layout


@pytest.fixture
def trial(server: Server, job: Job, undisturbed: Layout, tmp_path: Path) -> Trial:
    return Trial(server, job, undisturbed, tmp_path / "wh")
