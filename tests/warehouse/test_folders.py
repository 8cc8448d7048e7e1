"""What file managers, network disks and sync programs leave in a folder changes nothing that moewh reads or writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.ingest.model.loading import weights_fingerprint
from moewh.warehouse.files.layout import Layout
from tests.support.damage import sound_warehouse
from tests.support.models import save_model

LEFT = (
    ".DS_Store",
    "._routing.parquet",
    ".nfs000000000a1b2c3d",
    ".fuse_hidden0001",
    "Thumbs.db",
    "desktop.ini",
    "Icon\r",
)
QUERY = ("query", "expert_load", "--format", "csv")


def leave(*folders: Path, names: tuple[str, ...] = LEFT) -> None:
    for folder in folders:
        for name in names:
            (folder / name).write_bytes(b"\0\5\x16\7")  # as the files begin that macOS writes beside others
        (folder / ".stfolder").mkdir(exist_ok=True)


def moewh(layout: Layout, *arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments, "--warehouse", str(layout.root)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A warehouse of two runs, one of them sealed, with what others leave in each of its folders."""
    layout = sound_warehouse(tmp_path / "wh")
    moewh(layout, "seal", "one")
    leave(*(path for path in (layout.root, *layout.root.rglob("*")) if path.is_dir() and not path.is_symlink()))
    return layout


def test_a_warehouse_reads_as_before(layout: Layout, tmp_path: Path) -> None:
    assert moewh(layout, *QUERY) == moewh(sound_warehouse(tmp_path / "clean"), *QUERY)
    assert moewh(layout, "runs", "--format", "csv").count("\n") == 3


COMMANDS = [("check",), ("refresh",), ("seal", "one"), ("report", "-o", "x.html"), ("runs", "--delete", "one", "--yes")]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_works(arguments: tuple[str, ...], layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout.root.parent)
    moewh(layout, *arguments)
    assert "all as committed" in moewh(layout, "verify")
    assert moewh(layout, "runs", "--format", "csv").count("\n") == (2 if "--delete" in arguments else 3)


def test_a_folder_with_nothing_else_becomes_a_warehouse(tmp_path: Path) -> None:
    (tmp_path / "wh").mkdir()
    leave(tmp_path / "wh")
    moewh(Layout(tmp_path / "wh"), "refresh")
    assert "all as committed" in moewh(Layout(tmp_path / "wh"), "verify")


def test_publishing_twice_sends_nothing_twice(layout: Layout, tmp_path: Path) -> None:
    target = tmp_path / "public"
    target.mkdir()
    leave(target)
    arguments = ("publish", str(target), "--run", "one")
    moewh(layout, *arguments)
    leave(*(path for path in target.rglob("run_id=*") if path.is_dir()))
    files = {path: path.stat().st_ino for path in target.rglob("*.parquet")}
    moewh(layout, *arguments)
    assert {path: path.stat().st_ino for path in target.rglob("*.parquet")} == files


def test_the_weights_of_a_model_have_the_same_fingerprint(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({"a": torch.zeros(1)}, pickled / "pytorch_model.bin")
    for folder in (save_model(tmp_path / "model"), pickled):
        before = weights_fingerprint(folder)
        leave(folder, names=(*LEFT, "._model.safetensors", "._pytorch_model.bin"))
        assert weights_fingerprint(folder) == before


def test_an_ingest_is_completed(tmp_path: Path) -> None:
    folder, prompts = save_model(tmp_path / "model"), tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "a.txt").write_text("one\ntwo\n")
    arguments = ("ingest", "--model", str(folder), "--prompts", str(prompts), "--run-id", "run")
    layout = Layout(tmp_path / "wh")
    moewh(layout, *arguments)
    leave(folder, prompts, names=(*LEFT, "._model.safetensors", "._a.txt"))
    shutil.rmtree(layout.segment("run", 0))
    moewh(layout, *arguments)
    assert moewh(layout, "query", "-c", "select prompts from runs", "--format", "csv") == "prompts\n2\n"


def test_a_folder_of_checks_is_its_sql_files(layout: Layout, tmp_path: Path) -> None:
    checks = tmp_path / "checks"
    checks.mkdir()
    (checks / "no_tokens.sql").write_text("select run_id from runs where tokens < 0\n")
    leave(checks, names=(*LEFT, "._no_tokens.sql"))
    assert "no_tokens" in moewh(layout, "check", str(checks))
