"""`moewh ingest` with bad input: one clear line, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from moewh.cli.main import COMMANDS, main
from moewh.warehouse.files.layout import Layout
from tests.support.checkpoints import copy_with, with_config
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


def _without_content(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def _without_target(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


LFS = "Git LFS has not fetched {}. Run `git lfs pull`"
BROKEN = {
    "pointer to weights": (_without_content, "model.safetensors", LFS.format("/m/model.safetensors")),
    "pointer to a tokenizer": (_without_content, "tokenizer.json", LFS.format("tokenizer.json")),
    "pointer to a configuration": (_without_content, "config.json", LFS.format("config.json")),
    "link to weights": (_without_target, "model.safetensors", "model.safetensors is a link to a file that does not"),
    "link to a configuration": (_without_target, "config.json", "config.json is a link to a file that does not"),
    "no index": (
        lambda path: path.rename(path.with_name("model-00001-of-00002.safetensors")),
        "model.safetensors",
        "has model-00001-of-00002.safetensors, but neither model.safetensors nor an index of shards",
    ),
    "a number as text": (
        lambda path: path.write_text(path.read_text().replace('"num_experts": 8', '"num_experts": "8"')),
        "config.json",
        "(value: '8'). Check the files there, first config.json.",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_folder_that_is_not_whole_says_what_to_do(fault: str, models: Path, prompts: Path, tmp_path: Path) -> None:
    damage, file, says = BROKEN[fault]
    model = shutil.copytree(models / "tiny", tmp_path / "m")
    damage(model / file)
    assert says.replace("/m/", f"{model}/") in one_line(run(tmp_path / "wh", model, prompts), 1)
    assert not (tmp_path / "wh").exists()


def test_files_are_no_models_and_have_no_revision(models: Path, prompts: Path, tmp_path: Path) -> None:
    for file in (models / "tiny" / "config.json", Path("/dev/null")):
        assert "it is a file. Give the folder" in one_line(run(tmp_path / "wh", file, prompts), 1)
    for place in ("", "config.json"):
        for command in (["inspect"], ["import", "vllm", str(prompts), "--model"]):
            done = CliRunner().invoke(main, [*command, str(models / "tiny" / place), "--revision", "main"])
            assert "--revision main goes with a hub id" in one_line(done, 2)
    adapters = tmp_path / "out" / "checkpoint-5"
    adapters.mkdir(parents=True)
    (adapters / "adapter_config.json").write_text("{}")
    assert "sub-folders are checkpoints: checkpoint-5." in one_line(run(tmp_path / "wh", tmp_path / "out", prompts), 1)


@pytest.mark.parametrize(
    ("model", "says", "code"),
    [
        ("https://huggingface.co/org/m", "is not a hub id. Give org/m.", 2),
        ("https://huggingface.co/org/m/tree/step5", "is not a hub id. Give org/m with --revision step5.", 2),
        ("hf://org/m", "is not a hub id. Give org/m.", 2),
        ("org/m@step5", "is not a hub id. Give org/m with --revision step5.", 2),
        ("models/org/m", "there is no folder models/org/m", 1),
        ("C:\\models\\m", "there is no folder C:\\models\\m", 1),
    ],
)
def test_what_is_given_instead_of_a_hub_id(model: str, says: str, code: int, prompts: Path, tmp_path: Path) -> None:
    assert says in one_line(run(tmp_path / "wh", model, prompts), code)
    assert not (tmp_path / "wh").exists()


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_quantisation_that_transformers_ignores(
    stored: torch.dtype, models: Path, prompts: Path, tmp_path: Path
) -> None:
    """It would load the numbers without their scales, and route by them."""
    model = with_config(models / "tiny", tmp_path / "m", quantization_config={"quant_method": "modelopt"})
    scale = {"model.layers.0.mlp.gate.weight_scale": torch.ones(())}
    gate = "model.layers.0.mlp.gate.weight"
    model = copy_with(model, tmp_path / "n", lambda tensors: {**tensors, gate: tensors[gate].to(stored), **scale})
    says = "the weights are quantised (modelopt), which transformers"
    assert says in one_line(run(tmp_path / "wh", model, prompts), 1)
    assert not (tmp_path / "wh").exists()
    assert says in CliRunner().invoke(main, ["inspect", str(model)]).stdout


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (5, "the tokenizer's chat template is not text"),
        ({"default": 5}, "the tokenizer's chat template is not text"),
        ([{"name": "rag", "template": "{{ messages }}"}], "has chat templates for rag, and no default one"),
    ],
)
def test_chat_template_of_another_kind(template: Any, says: str, models: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models / "tiny", tmp_path / "m")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    assert says in one_line(run(tmp_path / "wh", model, tmp_path / "c.jsonl"), 1)
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
        (["--device", "meta"], "--device meta holds no numbers"),
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


@pytest.mark.parametrize("address", ["https://example.com/p.jsonl", "s3://bucket/p.jsonl", "file:///tmp/p.jsonl"])
def test_an_address_is_no_prompts_file(address: str, models: Path, tmp_path: Path) -> None:
    line = one_line(run(tmp_path / "wh", models / "tiny", address), 2)
    assert line.endswith("Over the network, only hf://datasets/… is read: download the file first.")


COMMANDS_OF_A_WAREHOUSE = (
    "ingest --model demo --prompts demo",
    "demo",
    "check",
    "query routes",
    "refresh",
    "runs",
    "runs --delete a --yes",
    "seal a",
    "shell",
    "show --prompt 0",
    "verify",
    "verify --repair",
    "publish out",
    "report -o x.html",
    "geometry --run a --model demo",
    "export eplb -o x.npy",
)


@pytest.mark.parametrize("command", COMMANDS_OF_A_WAREHOUSE)
@pytest.mark.parametrize("where", ["file", "file/wh", "link", "link/wh"])
def test_a_warehouse_is_a_folder(where: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    line = one_line(CliRunner().invoke(main, [*command.split(), "--warehouse", str(tmp_path / where)]), 2)
    first = tmp_path / where.partition("/")[0]
    assert line.startswith(
        f"moewh: {first} is not a folder." if "file" in where else f"moewh: {first} is a link to {tmp_path}/nowhere, "
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


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
    assert f"delete it with `moewh runs --delete mine --warehouse {warehouse}`." in line
    assert {path: path.stat().st_mtime_ns for path in warehouse.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(models: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write" in one_line(run(tmp_path / "locked" / "wh", models / "tiny", prompts), 1)


def test_unwritable_warehouse(models: Path, prompts: Path) -> None:
    assert "cannot write" in one_line(run(Path("/proc/wh"), models / "tiny", prompts), 1)


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
