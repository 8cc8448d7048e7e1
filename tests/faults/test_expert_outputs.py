"""A run with expert outputs, killed and resumed: the same bytes as an undisturbed one."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from tests.support.damage import faults_of
from tests.support.faults import Job, Server, segments_of
from tests.support.runs import contents

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux has them")


def test_killed_and_resumed(server: Server, job: Job, tmp_path: Path) -> None:
    asked = ("--run-id", "o", "--expert-outputs")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = server.moewh(job.plan(whole, *asked))
    assert undisturbed["code"] == 0
    kept = []
    for share in (0.8, 0.16):  # of all steps; the second time, most are done already
        step = int(share * undisturbed["result"])
        assert server.moewh(job.plan(killed, *asked, kill_at=step))["code"] == -signal.SIGKILL
        kept.append(len(segments_of(killed)))
    assert 0 < kept[0] < kept[1] < len(segments_of(whole)), (kept, undisturbed["result"])
    assert server.moewh(job.plan(killed, *asked))["code"] == 0
    assert contents(killed) == contents(whole)
    assert faults_of(Layout(killed)) == []
    for table in (schema.EXPERT_OUTPUTS, schema.EXPERT_OUTPUT_COUNTS):
        assert len(list(killed.glob(f"segments/run_id=o/segment=*/{table.file}"))) == len(segments_of(killed))
    assert (Layout(killed).sealed("o") / schema.EXPERT_OUTPUT_COUNTS.file).is_file()
