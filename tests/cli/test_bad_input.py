"""`moewh ingest` with bad input: one clear line, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import COMMANDS, main
from moewh.warehouse.files.layout import Layout
from tests.support.models import save_model
from tests.support.opened import viewed
from tests.support.synthetic import empty_warehouse


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "tiny")
    save_model(folder / "other", "mixtral")
    save_model(folder / "dense", "qwen3-dense")
    (folder / "nothing").mkdir()
    pickled = save_model(folder / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    return path


def run(warehouse: Path, model: Path | str, prompts: Path | str, *more: str) -> Result:
    arguments = ["ingest", "--model", str(model), "--prompts", str(prompts), "--warehouse", str(warehouse), *more]
    return CliRunner().invoke(main, arguments)


def one_line(result: Result, code: int) -> str:
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    line, *rest = result.stderr.splitlines()
    assert rest == []
    assert line.startswith("moewh: ")
    return line


OF_A_MODEL = {
    "ingest": ["--prompts", "demo"],
    "inspect": [],
    "geometry": [],
    "import": ["plain", "{trace}"],
}
"""Every command that is given a model, and its other arguments."""


def test_every_command_of_a_model_is_tested() -> None:
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in COMMANDS}
    given = {
        name
        for name, one in commands.items()
        if one and any("--model" in each.opts or each.name == "model" for each in one.get_params(context))
    }
    assert set(OF_A_MODEL) == given


@pytest.mark.parametrize("command", OF_A_MODEL)
def test_a_model_without_a_name_or_of_no_revision(
    command: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty name would mean the folder that the command runs in."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"expert_ids": [[[0]]]}\n')
    words = [command, *(word.format(trace=trace) for word in OF_A_MODEL[command]), "--warehouse", str(tmp_path / "wh")]
    monkeypatch.chdir(models / "tiny")
    if command == "geometry":
        empty_warehouse(tmp_path / "wh")
    before = sorted(tmp_path.rglob("*"))

    def said(*model: str) -> str:
        named = list(model) if command == "inspect" else ["--model", *model]
        return one_line(CliRunner().invoke(main, [*words, *named]), 2)

    assert "is empty. Is a variable unset?" in said("")
    assert "the demo model has no revision 'x'. Known: step-000040, " in said("demo", "--revision", "x")
    if command in ("ingest", "import"):
        assert "is empty. Is a variable unset?" in said("demo", "--tokenizer", "")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("missing", "there is no folder"),
        ("nothing", "cannot load the model"),
        ("dense", "has no routed experts: it is a dense model"),
        ("pickled", "safetensors"),
    ],
)
def test_unusable_model(model: str, says: str, models: Path, prompts: Path, tmp_path: Path) -> None:
    assert says in one_line(run(tmp_path / "wh", models / model, prompts), 1)
    assert not (tmp_path / "wh").exists()


def test_model_that_the_hub_does_not_have(prompts: Path, tmp_path: Path) -> None:
    line = one_line(run(tmp_path / "wh", "nobody/no-such-model", prompts), 1)
    assert "cannot load the model nobody/no-such-model" in line
    assert not (tmp_path / "wh").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run-id", "../up"], "run id '../up' is not allowed"),
        (["--run-id", "~schema"], "run id '~schema' is not allowed"),
        (["--run-id", "a" * 65], "is not allowed"),
        (["--max-length", "0"], "--max-length is 0"),
        (["--max-length", "9999"], "more than"),
        (["--batch-tokens", "-1"], "--batch-tokens is -1"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--dtype", "int3"], "--dtype int3 is not known"),
        (["--revision", "main"], "--revision main goes with a hub id"),
        (["--on-overflow", "wrap"], "'wrap' is not one of"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_use(arguments: list[str], says: str, models: Path, prompts: Path, tmp_path: Path) -> None:
    assert says in one_line(run(tmp_path / "wh", models / "tiny", prompts, *arguments), 2)
    assert not (tmp_path / "wh").exists()


def test_no_such_file_and_no_prompts(models: Path, tmp_path: Path) -> None:
    assert "there is no prompts file" in one_line(run(tmp_path / "wh", models / "tiny", tmp_path / "none.txt"), 2)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "there are no prompts" in one_line(run(tmp_path / "wh", models / "tiny", tmp_path / "empty.jsonl"), 1)
    assert not (tmp_path / "wh").exists()


def test_invalid_json_is_named_by_its_line(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "x"}\n' * 6 + "{oops\n")
    line = one_line(run(tmp_path / "wh", models / "tiny", path), 1)
    assert f"{path}: line 7 is not valid JSON" in line
    assert not (tmp_path / "wh").exists()


def test_error_on_overflow_leaves_nothing(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"text": "x" * 500}))
    line = one_line(run(tmp_path / "wh", models / "tiny", path, "--on-overflow", "error"), 1)
    assert "prompt 0 has 501 tokens, over the maximum length 64" in line
    assert not (tmp_path / "wh").exists()


@pytest.mark.parametrize(
    ("texts", "counted"),
    [(["x", "x" * 500, "x" * 500, ""], "4 prompts (1 empty, 2 truncated), "), (["x"], "1 prompt, ")],
)
def test_prompts_not_run_as_a_whole_are_counted(texts: list[str], counted: str, models: Path, tmp_path: Path) -> None:
    """Of every segment that the command writes."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = run(tmp_path / "wh", models / "tiny", path, "--run-id", "cut", "--segment-rows", "700")
    assert f"run cut: {counted}" in result.stderr
    (segments,) = viewed(Layout(tmp_path / "wh")).execute("select count(distinct segment) from prompts").fetchall()
    assert (segments[0] > 1) == (len(texts) > 1)


def test_run_id_of_another_model_is_refused_and_untouched(models: Path, prompts: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "wh"
    assert run(warehouse, models / "tiny", prompts, "--run-id", "mine").exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in warehouse.rglob("*") if path.is_file()}
    line = one_line(run(warehouse, models / "other", prompts, "--run-id", "mine"), 1)
    assert "run 'mine' exists and is another run: " in line
    assert "model was tiny, now other" in line
    assert "moewh runs --delete mine" in line
    assert {path: path.stat().st_mtime_ns for path in warehouse.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(models: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write" in one_line(run(tmp_path / "locked" / "wh", models / "tiny", prompts), 1)


@pytest.mark.parametrize("place", ["/proc/wh", "file/wh"])
def test_unwritable_warehouse(place: str, models: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in one_line(run(tmp_path / place, models / "tiny", prompts), 1)


def test_fresh_segments_are_visible_and_the_file_published(models: Path, prompts: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "wh", models / "tiny", prompts, "--run-id", "007")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "run 007: 2 prompts, 8 tokens, 72 routing rows" in result.stderr
    assert (tmp_path / "wh" / "warehouse.duckdb").is_file()
    assert viewed(Layout(tmp_path / "wh")).execute("select run_id from runs").fetchall() == [("007",)]
    again = run(tmp_path / "wh", models / "tiny", prompts, "--run-id", "007")
    assert "complete already" in again.stderr


def test_broken_weights(models: Path, prompts: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(models / "tiny", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    assert "cannot load the model" in one_line(run(tmp_path / "wh", broken, prompts), 1)
