"""A warehouse of which this user may not read a part: it is refused by name, never answered without that part."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal
from tests.support.damage import fresh_copy, sound_warehouse

_READ_ANYTHING = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root reads what its mode forbids."""
_DROP = 24
"""PR_CAPBSET_DROP."""
PARTS = [
    "unsealed/run_id=two",
    "segments/run_id=one",
    "segments/run_id=one/segment=1",
    "runs/run_id=one",
    "sealed/run_id=one",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = sound_warehouse(tmp_path_factory.mktemp("sound") / "wh")
    seal(layout, "one")
    return layout


@pytest.fixture
def layout(sound: Layout) -> Iterator[Layout]:
    layout = fresh_copy(sound)
    yield layout
    for path in PARTS:
        if (layout.root / path).is_dir():
            (layout.root / path).chmod(0o755)


def _as_any_user() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in _READ_ANYTHING:
        if libc.prctl(_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


def moewh(layout: Layout, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moewh", *arguments, "--warehouse", str(layout.root)],
        capture_output=True,
        text=True,
        preexec_fn=_as_any_user if os.geteuid() == 0 else None,
        check=False,
    )


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o311])
@pytest.mark.parametrize("part", PARTS)
def test_a_folder_without_permission_is_refused_by_name(part: str, mode: int, layout: Layout) -> None:
    (layout.root / part).chmod(mode)
    for command in (["query", "-c", "select count(*) from routing"], ["runs"], ["query", "expert_load"]):
        refused = moewh(layout, *command)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert part in refused.stderr
        assert "Permission denied" in refused.stderr


@pytest.mark.parametrize("part", ["", "secret"])
def test_a_folder_of_prompts_without_permission_is_refused_by_name(part: str, layout: Layout, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "secret"):
        place.mkdir(exist_ok=True)
        (place / "p.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / part).chmod(0o000)
    refused = moewh(layout, "ingest", "--model", "demo", "--prompts", str(tmp_path), "--run-id", "two")
    (tmp_path / part).chmod(0o755)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "cannot be read: Permission denied" in refused.stderr


@pytest.mark.parametrize("part", ["segments/run_id=one/segment=1", "segments/run_id=one/segment=1/routing.parquet"])
def test_repair_leaves_what_it_may_not_read(part: str, layout: Layout) -> None:
    path: Path = layout.root / part
    path.chmod(0o000)
    found = moewh(layout, "verify")
    assert found.returncode == 1
    assert "Permission denied" in found.stdout
    assert "--repair" not in found.stdout
    assert moewh(layout, "verify", "--repair").returncode == 1
    path.chmod(0o755)
    assert moewh(layout, "verify").returncode == 0
    assert not (layout.root / "quarantine").exists()
