"""A warehouse of which this user may not read a part: it is refused by name, never answered without that part."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal
from tests.support.damage import fresh_copy, sound_warehouse
from tests.support.forked_program import forked_moewh

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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`moewh`, of which every process may read what any user may."""
    as_any_user = _as_any_user if os.geteuid() == 0 else None
    with forked_moewh(tmp_path_factory.mktemp("forked"), models=True, before=as_any_user) as program:
        yield program


Moewh = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def moewh(program: Path, layout: Layout) -> Moewh:
    """Runs the command on the warehouse."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(program), *arguments, "--warehouse", str(layout.root)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o311])
@pytest.mark.parametrize("part", PARTS)
def test_a_folder_without_permission_is_refused_by_name(part: str, mode: int, layout: Layout, moewh: Moewh) -> None:
    (layout.root / part).chmod(mode)
    for command in (["query", "-c", "select count(*) from routing"], ["runs"], ["query", "expert_load"]):
        refused = moewh(*command)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert part in refused.stderr
        assert "Permission denied" in refused.stderr


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o311])
@pytest.mark.parametrize(
    ("part", "pattern"),
    [
        *((part, pattern) for part in ("", "secret") for pattern in ("", "**/*.jsonl", "**")),
        *(("secret", pattern) for pattern in ("*", "s*/*.jsonl", "*/*", "[s]ecret/*")),
        *(("secret/more", pattern) for pattern in ("*/more/*.jsonl", "**/more/*", "*/*/p.jsonl", "secret/**")),
    ],
)
def test_a_folder_of_prompts_without_permission_is_refused_by_name(
    part: str, pattern: str, mode: int, moewh: Moewh, tmp_path: Path
) -> None:
    for place in (tmp_path, tmp_path / "secret", tmp_path / "secret/more"):
        place.mkdir(exist_ok=True)
        (place / "p.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / part).chmod(mode)
    refused = moewh("ingest", "--model", "demo", "--prompts", str(tmp_path / pattern), "--run-id", "three")
    (tmp_path / part).chmod(0o755)
    if pattern == "*/*/p.jsonl" and mode == 0o311:
        assert refused.returncode == 0, refused.stderr  # a folder is searched for this one name, which needs no more
        return
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert str(tmp_path / part) in refused.stderr
    assert "cannot be read: Permission denied" in refused.stderr


def test_a_file_of_prompts_without_permission_is_refused_by_name(moewh: Moewh, tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "two.jsonl").chmod(0o000)
    for prompts in (tmp_path, tmp_path / "*.jsonl", tmp_path / "two.jsonl"):
        refused = moewh("ingest", "--model", "demo", "--prompts", str(prompts), "--run-id", "two")
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert f"{tmp_path / 'two.jsonl'}" in refused.stderr
        assert "Permission denied" in refused.stderr


@pytest.mark.parametrize("part", ["segments/run_id=one/segment=1", "segments/run_id=one/segment=1/routing.parquet"])
def test_repair_leaves_what_it_may_not_read(part: str, layout: Layout, moewh: Moewh) -> None:
    path: Path = layout.root / part
    path.chmod(0o000)
    found = moewh("verify")
    assert found.returncode == 1
    assert "Permission denied" in found.stdout
    assert "--repair" not in found.stdout
    assert moewh("verify", "--repair").returncode == 1
    path.chmod(0o755)
    assert moewh("verify").returncode == 0
    assert not (layout.root / "quarantine").exists()
