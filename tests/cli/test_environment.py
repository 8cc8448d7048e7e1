"""Odd environments: packages that are missing or hidden, limits of the system, names that are not UTF-8.

Each is one line that names what is wrong, and nothing is written.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType

import duckdb
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

import moewh
from moewh import api
from moewh.cli.failures import explain
from moewh.cli.main import main
from moewh.ingest.model.light_start import explaining_imports
from moewh.ingest.model.loading import find_source, load_failure
from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts.json_records import read_json
from moewh.ingest.prompts.sources import find_inputs, prompt_file
from moewh.warehouse.answer.output import replaced
from moewh.warehouse.errors import NOT_POSIX, MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.remote.place import remote
from tests.support.synthetic import Prompt, Run, Token, write_run

NOT_UTF8 = os.fsdecode(b"p\xff")


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = Layout(tmp_path_factory.mktemp("environment") / "wh")
    layout.create()
    write_run(layout, Run("a", {0: (2, 1)}, [[Prompt([Token(1, {0: [(0, 0.5)]})])]]))
    return layout.root


def one_line(code: int, *arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_missing_package(warehouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    line = one_line(1, "query", "runs", "--warehouse", str(warehouse))
    assert line.startswith("moewh: the package duckdb is not installed")


WITHOUT_LOCKS = """
import sys

class WithoutLocks:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ModuleNotFoundError("No module named 'fcntl'", name=name)

sys.meta_path.insert(0, WithoutLocks())
"""
"""Windows has no fcntl."""


@pytest.mark.parametrize("command", [["--help"], ["runs"], ["ingest", "--model", "demo", "--prompts", "demo"]])
@pytest.mark.parametrize(
    "start", ["from moewh.cli.main import main; main()", "import runpy; runpy.run_module('moewh')"]
)
def test_windows_is_one_line(command: list[str], start: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_LOCKS + start, *command]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"moewh: {NOT_POSIX}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call", ["open('wh')", "ingest('demo', 'demo')", "Writer", "record", "TrainerCallback", "plots"]
)
def test_windows_is_named_in_python(call: str) -> None:
    code = f"{WITHOUT_LOCKS}import moewh\ntry:\n    moewh.{call}\nexcept moewh.MoewhError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{NOT_POSIX}\n"


def test_package_hidden_by_a_file_of_its_name(warehouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("duckdb")
    mine.__file__ = "/home/me/duckdb.py"
    monkeypatch.setitem(sys.modules, "duckdb", mine)
    line = one_line(1, "query", "runs", "--warehouse", str(warehouse))
    assert line.startswith("moewh: the package duckdb cannot be used: module 'duckdb' has no attribute")
    assert "If /home/me/duckdb.py is a file of yours, rename it" in line


def test_a_bug_keeps_its_traceback() -> None:
    ours = AttributeError("module 'moewh.api' has no attribute 'x'", name="x", obj=ModuleType("moewh.api"))
    assert explain(ours) is None
    assert explain(AttributeError("no attribute 'x'", name="x", obj=os)) is None
    assert explain(AttributeError("no attribute 'x'", name="x", obj=1)) is None
    assert explain(ImportError("cannot import name 'x'", name="moewh.api")) is None


def test_remote_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MoewhError, match=r"pip install 'moewh\[remote\]'"):
        remote("s3://bucket/folder")


def test_no_more_threads(warehouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert "no more threads can be started" in one_line(1, "query", "runs", "--warehouse", str(warehouse))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "enough memory"),
        (pa.ArrowException("Unknown error: Failed to launch worker thread: again"), "no more threads"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
    ],
)
def test_limits_are_not_the_models_fault(error: Exception, says: str) -> None:
    assert explain(error) is not None
    assert says in str(explain(error))
    told = load_failure("org/model", error)
    assert says in told
    assert "Check the name" not in told


@pytest.mark.parametrize(
    "text", ["Failed to allocate block of 9 bytes (bad allocation)", "failed to pin block (9/9 used)"]
)
def test_memory_is_not_the_prompts_fault(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "x"}\n')

    def relation(*_: object) -> str:
        raise duckdb.OutOfMemoryException(f"Out of Memory Error: {text}")

    options = IngestOptions(model="demo", prompts=(str(path),))
    with pytest.raises(MoewhError, match=r"p\.jsonl: cannot be read: ") as raised:
        list(read_json(path, prompt_file(path, "jsonl", path.name, path.name, options), "jsonl", relation))
    assert "not valid JSON" not in str(raised.value)


def test_names_that_are_not_utf8(warehouse: Path, tmp_path: Path) -> None:
    (tmp_path / NOT_UTF8).mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"{NOT_UTF8}.txt").write_text("text\n")
    (tmp_path / f"{NOT_UTF8}.json").write_text("[]")
    before = sorted(tmp_path.rglob("*"))
    odd = str(tmp_path / NOT_UTF8)
    placed = ("query", "placement_quality", "-p", f"placement={odd}.json")
    asked = (
        (*placed, "--warehouse", str(warehouse)),
        ("query", "runs", "--warehouse", str(warehouse), "-o", f"{odd}.csv"),
        ("publish", f"{odd}/out", "--warehouse", str(warehouse)),
    )
    for arguments in asked:
        assert "is not UTF-8. Rename it" in one_line(2, *arguments)
    with pytest.raises(UsageError, match=r"is not UTF-8\. Rename it"):
        find_source(odd, None)
    for name in (f"{odd}.jsonl", str(tmp_path / "folder")):
        with pytest.raises(UsageError, match=r"is not UTF-8\. Rename it"):
            find_inputs(IngestOptions(model="demo", prompts=(name,)))
    assert sorted(tmp_path.rglob("*")) == before


# Each form in one locale, and one form in every locale: no form looks at the locale by itself.
@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        *(("query csv", encoding) for encoding in ("ascii", "latin-1", "utf-16")),
        *(("query json", "ascii"), ("query jsonl", "latin-1"), ("query markdown", "utf-16")),
        *(("check json", "utf-16"), ("check junit", "latin-1")),
    ],
)
def test_printed_data_is_what_a_file_holds_in_every_locale(
    command: str, encoding: str, warehouse: Path, tmp_path: Path
) -> None:
    name, form = command.split()
    (tmp_path / "mine.sql").write_text("select 'é \u65e5 \U0001f600' as word", encoding="utf-8")

    def run(*more: str) -> bytes:
        arguments = [name, str(tmp_path / "mine.sql"), "--format", form, "--warehouse", str(warehouse), *more]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [sys.executable, "-m", "moewh", *arguments], capture_output=True, check=False, env=environment
        )
        assert (done.returncode, done.stderr) == (int(name == "check"), b"")
        return done.stdout

    def timeless(text: bytes) -> str:
        return re.sub(r'(time="|"seconds": )[0-9.]+', "", text.decode("utf-8"))

    assert run("-o", str(tmp_path / "file")) == b""
    printed = timeless(run())
    assert printed == timeless((tmp_path / "file").read_bytes())
    assert "é \u65e5 \U0001f600" in printed


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, replaced(tmp_path / "o.csv") as partial:
        partial.write_text("part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert explain(raised.value) == (f"{tmp_path / 'o.csv'}: No space left on device.", 1)
    assert not list(tmp_path.iterdir())


def test_duckdb_program_that_cannot_run(warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "duckdb"
    program.write_text("no program\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"{program} cannot be run: " in one_line(1, "shell", "--warehouse", str(warehouse))


def test_variable_that_a_package_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "soon")
    says = r"The environment has HF_HUB_DOWNLOAD_TIMEOUT=soon: correct or unset it\."
    with pytest.raises(MoewhError, match=says), explaining_imports():
        int(os.environ["HF_HUB_DOWNLOAD_TIMEOUT"])


def test_package_that_torch_lacks() -> None:
    with pytest.raises(MoewhError, match=r"No module named 'nowhere'\. Install that package\."), explaining_imports():
        import_module("nowhere")


def test_ingest_after_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child keeps what its parent noted, and has another number; without a fork, nothing is refused."""
    monkeypatch.setattr(api, "_ingested_in", set())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for _ in range(2):
        with pytest.raises(UsageError, match="there is no prompts file"):
            moewh.ingest("demo", tmp_path / "none.txt", tmp_path / "wh")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(MoewhError, match="forked after a model ran"):
        moewh.ingest("demo", tmp_path / "none.txt", tmp_path / "wh")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(UsageError, match="there is no prompts file"):
        moewh.ingest("demo", tmp_path / "none.txt", tmp_path / "wh")
    assert not (tmp_path / "wh").exists()


def test_python_without_docstrings_and_as_a_module() -> None:
    light = "from moewh.ingest.model.light_start import start_light; start_light(other_code=False)"
    refused = subprocess.run([sys.executable, "-OO", "-c", light], capture_output=True, text=True, check=False)
    assert "UsageError: transformers reads docstrings, which `python -OO` removes." in refused.stderr
    shown = subprocess.run([sys.executable, "-m", "moewh", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("moewh ")
