"""The light start of a command: what it leaves out is loaded on use, and the rows are the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from transformers.utils.import_utils import is_torch_distributed_available

from moewh.cli.main import main
from moewh.ingest.model import light_start
from moewh.ingest.options import IngestOptions
from moewh.ingest.run import ingest
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from tests.support.models import save_model, tiny_model
from tests.support.runs import contents, write_prompts

COMMAND = """
import os, sys
from moewh.cli.main import main
commands = " ".join(sys.argv[1:]).split(" then ")
for command in commands:
    try:
        main(command.split())
    except SystemExit as exited:
        if exited.code or command is commands[-1]:
            raise
    finally:
        heavy = {"torch._dynamo.convert_frame", "torch.distributed.tensor", "torch.distributed.checkpoint"}
        print("left out:", *heavy & set(sys.modules), os.environ.get("OMP_WAIT_POLICY"))
"""
WITHOUT_PEFT = "import sys; sys.modules['peft'] = None\n"
REACH = """
import os, sys
from moewh.ingest.model.light_start import start_light
start_light(other_code=False)
assert "OMP_WAIT_POLICY" not in os.environ, "the user's own way to wait"
import torch
from transformers.integrations import deepgemm, finegrained_fp8
in_graph = [value for module in (deepgemm, finegrained_fp8) for value in vars(module).values()
            if value in sys.modules["torch._dynamo"]._in_graph]
assert in_graph, "transformers marks no function: the test shows nothing"
left_alone = torch.compiler.disable(lambda x: x + 1)
assert left_alone(torch.zeros(1)) == 1 and "torch._dynamo.convert_frame" not in sys.modules
assert torch.distributed.is_available()
assert "torch.distributed.tensor" not in sys.modules and torch.distributed.tensor.DTensor
assert not hasattr(torch.distributed, "nothing_of_this_name")

compiled = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
assert compiled(torch.ones(2)).tolist() == [2, 2]
import torch._dynamo._trace_wrapped_higher_order_op
from torch._dynamo import trace_rules
from torch._dynamo.variables import TorchInGraphFunctionVariable
assert torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex
assert all(trace_rules.lookup_callable(function) is TorchInGraphFunctionVariable for function in in_graph)
try:
    torch.compile(left_alone, backend="eager", fullgraph=True)(torch.zeros(1))
except torch._dynamo.exc.Unsupported:
    print("left alone")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 20)


def python(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a separate process, without the variables that set threads; return its output."""
    inherited = {name: value for name, value in os.environ.items() if "OMP" not in name and "MKL" not in name}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # DuckDB's report about anything not freed when the process ends
    return done.stdout


def test_what_was_left_out_is_loaded_when_it_is_asked_for_and_users_way_to_wait_wins() -> None:
    assert python(REACH, GOMP_SPINCOUNT="7") == "left alone\n"


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A folder of packages that cannot be imported, such as a torchvision that is made for another torch."""
    for name in ("PIL", "scipy", "torchvision"):
        package = tmp_path / "broken" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise RuntimeError('operator {name}::nms does not exist')")
        (package / "Image.py").write_text("")
    return str(tmp_path / "broken")


def test_commands_load_no_compiler_nor_packages_for_images_and_write_what_the_library_does(
    tmp_path: Path, model: Path, prompts: Path, broken: str
) -> None:
    """One after another: that each of them starts light by itself is shown by the test below. peft is not there."""
    written, library = tmp_path / "command", tmp_path / "library"
    commands = (
        f"ingest --model {model} --prompts {prompts} --warehouse {written}",
        f"inspect {model}",
        f"geometry --model {model} --warehouse {written}",
    )
    paths = os.pathsep.join([broken, *sys.path])
    threads = str(torch.get_num_threads())
    printed = python(WITHOUT_PEFT + COMMAND, " then ".join(commands), PYTHONPATH=paths, OMP_NUM_THREADS=threads)
    assert re.findall("left out: .*", printed) == ["left out: passive"] * 3
    ingest(IngestOptions(model=str(model), prompts=(str(prompts),)), Layout(library))
    result = CliRunner().invoke(main, ["geometry", "--model", str(model), "--warehouse", str(library)])
    assert result.exit_code == 0, result.output
    assert contents(written) == contents(library) != {}


@pytest.mark.parametrize("command", ["ingest", "inspect", "geometry"])
def test_code_of_a_model_may_import_them_and_a_broken_one_is_named(
    command: str, tmp_path: Path, model: Path, prompts: Path, broken: str
) -> None:
    words = {
        "ingest": ["--model", str(model), "--prompts", str(prompts), "--warehouse", str(tmp_path / "wh")],
        "inspect": [str(model)],
        "geometry": ["--model", str(model), "--warehouse", str(tmp_path / "wh")],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, command, *words, "--trust-remote-code"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([broken, *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"moewh: torch and transformers cannot be imported: RuntimeError: operator \w+::nms does not exist\. "
        r"Install versions that fit together, or remove the package that is named here\.\n",
        done.stderr,
    )
    assert not (tmp_path / "wh").exists()


def test_a_failure_that_hides_what_was_tried_before_is_the_one_named() -> None:
    def falls_back() -> None:
        try:
            raise KeyError("the way that need not work")
        except KeyError:
            raise ImportError("nor does the other") from None

    with pytest.raises(MoewhError, match="imported: ImportError: nor does the other"), light_start.explaining_imports():
        falls_back()


def test_command_applies_an_adapter_as_the_library_does(tmp_path: Path, model: Path, prompts: Path) -> None:
    """peft uses parts of torch that it leaves to transformers to import."""
    peft = pytest.importorskip("peft")
    from tests.support.lora import save_adapter

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapter = save_adapter(tiny_model("olmoe"), tmp_path / "adapter", model, settings)
    words = ("ingest", "--model", str(adapter), "--prompts", str(prompts), "--warehouse", str(tmp_path / "command"))
    python(COMMAND, *words, OMP_NUM_THREADS=str(torch.get_num_threads()))
    ingest(IngestOptions(model=str(adapter), prompts=(str(prompts),)), Layout(tmp_path / "library"))
    assert contents(tmp_path / "command") == contents(tmp_path / "library") != {}


def test_library_leaves_its_users_process_alone() -> None:
    """This process has imported the whole of `moewh.ingest.run` and never asked for a light start before it did."""
    assert is_torch_distributed_available()
    assert type(sys.modules.get("torch._dynamo")).__name__ != "_LazyCompiler"


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("environment", "cpus", "threads"),
    [({}, 1, 1), ({}, 2, 2), ({}, 64, 2), ({"OMP_NUM_THREADS": "2"}, 1, 2), ({"MKL_NUM_THREADS": "2"}, 1, 2)],
)
def test_threads(environment: dict[str, str], cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light_start, "usable_cpus", lambda: cpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    light_start.set_threads()
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("two_threads")
def test_command_records_the_threads_it_may_use(
    tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = ["ingest", "--model", str(model), "--prompts", str(prompts), "--warehouse", str(tmp_path)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    (row,) = tmp_path.glob("runs/run_id=tiny*/run.parquet")
    assert pq.read_table(row, columns=["threads"], partitioning=None).to_pylist() == [{"threads": 1}]
