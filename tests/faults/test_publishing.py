"""Publishing really killed: `moewh publish` in a separate process, ended by SIGKILL while a reader reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.remote.published import readable
from moewh.warehouse.runs import run_ids
from moewh.warehouse.trust.published import check_any, plan_any
from moewh.warehouse.views.opening import open_warehouse
from tests.support.published import RUNS, publishable, s3, stored

COMMAND = [sys.executable, "-c", "from moewh.cli.main import main; main()", "publish"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return publishable(tmp_path_factory.mktemp("source") / "wh")


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with s3() if request.param == "s3" else nullcontext(str(tmp_path)) as top:
        yield f"{top}/published"


def sent(place: str) -> int:
    """Return the number of existing files, listed or not."""
    if "://" not in place:
        return sum(len(files) for _, _, files in os.walk(place))  # which tolerates folders that come and go
    return len(stored())


def seen(place: str) -> list[str]:
    """Return the runs that a reader sees, after checking that their files are whole; none without a listing."""
    found = readable(place)
    try:
        found.require()
    except MoewhError:
        return []
    if isinstance(found, Layout):  # killed before the first listing: zero-row files alone
        assert run_ids(found) == []
        return []
    assert check_any(plan_any(found)) == []
    with open_warehouse(found) as connection:
        runs = connection.execute("select run_id from runs where status = 'complete' order by all").fetchall()
        assert runs == connection.execute("select distinct run_id from routing order by all").fetchall()
    return [run_id for (run_id,) in runs]


def test_killed_at_any_moment_it_goes_on(place: str, source: Layout) -> None:
    before: list[str] = []
    command = [*COMMAND, place, "--warehouse", str(source.root)]
    for files in (1, 40, 75):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        began = time.monotonic()
        while process.poll() is None and sent(place) < files and time.monotonic() - began < 60:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
        now = seen(place)
        assert set(before) <= set(now)
        before = now
    result = CliRunner().invoke(main, command[3:])
    assert result.exit_code == 0, result.output
    assert seen(place) == sorted(RUNS)
