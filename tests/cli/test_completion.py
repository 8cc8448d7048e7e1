"""Shell completion: the candidates after given words, and that real shells use them."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moewh.cli.completion import COMPLETE_VAR, Bash, Fish, Zsh
from moewh.cli.main import main
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.answer.query import saved_names
from moewh.warehouse.views.shipped import canned_names, view_names
from tests.support.synthetic import Run, random_warehouse

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    layout, runs = random_warehouse(tmp_path_factory.mktemp("completion") / "wh")
    return layout.root, runs


@pytest.fixture(autouse=True)
def here(warehouse: tuple[Path, list[Run]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEWH_WAREHOUSE", str(warehouse[0]))


def offered(line: str) -> list[str]:
    """Return the candidates at the end of a line, whose last word may be empty."""
    *args, incomplete = line.split(" ")
    return [str(item.value) for item in Bash(main, {}, "moewh", COMPLETE_VAR).get_completions(args, incomplete)]


RUNS = ["007", "mixed", "step-1", "step-20", "step-30", "wide.v-1"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("query ", [*canned_names(), *saved_names()]),
        ("query load_d", ["load_drift"]),
        ("query load_drift -p ", ["layer=", "series="]),
        ("query load_drift -p series=x -p ", ["layer="]),
        ("query load_drift -p la", ["layer="]),
        ("query load_drift -p layer=", [f"layer={layer}" for layer in (0, 1, 2, 3, 4, 5)]),
        ("query contrast_runs -p other_run=step", ["other_run=step-1", "other_run=step-20", "other_run=step-30"]),
        ("query contrast_runs -p run=nope", []),
        ("query --format ", list(FORMATS)),
        ("views ", list(view_names())),
        ("views router_c", ["router_confidence"]),
        ("show --run ", RUNS),
        ("show --layer ", ["0", "1", "2", "3", "4", "5"]),
        ("runs --delete w", ["wide.v-1"]),
        ("seal ", RUNS),
        ("export eplb --run m", ["mixed"]),
        ("geometry --run-id step-2", ["step-20"]),
        ("check -p ", ["run="]),
        ("check -p run=0", ["run=007"]),
        ("import vl", ["vllm"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("sh", ["show", "shell"]),
        ("show --warehouse /nowhere --run ", [""]),
        ("query --warehouse /nowhere load_drift -p layer=", []),
    ],
)
def test_offered(line: str, expected: list[str]) -> None:
    assert sorted(offered(line)) == sorted(expected)


def test_parameters_of_a_users_own_sql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.sql").write_text("select * from routes where run_id = getvariable('a') and layer = getvariable('depth')")
    assert offered("query mine.sql -p ") == ["a=", "depth="]
    assert offered("query mine.sql -p a=m") == ["a=mixed"]
    assert offered("check mine.sql -p depth=") == [f"depth={layer}" for layer in range(6)]
    assert offered("query -c select=getvariable('b') -p ") == ["b="]
    assert offered("query absent.sql -p ") == [""]


@pytest.mark.parametrize(
    ("line", "kind"),
    [("query ./", "file"), ("check ", "file"), ("ingest --prompts ", "file"), ("query --warehouse ", "dir")],
)
def test_files_and_folders_are_left_to_the_shell(line: str, kind: str) -> None:
    *args, incomplete = line.split(" ")
    for shell in (Bash, Zsh, Fish):
        (item,) = shell(main, {}, "moewh", COMPLETE_VAR).get_completions(args, incomplete)
        assert (item.type, item.value) == (kind, incomplete)


@pytest.mark.parametrize(
    ("words", "cursor", "breaks", "answer"),
    [
        ("moewh query contrast_runs -p run = wi", 6, "=:", "plain,wide.v-1"),
        ("moewh query contrast_runs -p run =", 5, "=:", "\n".join(f"plain,{run}" for run in RUNS)),
        ("moewh query contrast_runs -p run=wi", 4, "", "plain,run=wide.v-1"),
        ("moewh query contrast_runs -p run = mixed -p other_", 8, "=:", "assignment,other_run="),
        (
            "moewh query contrast_runs -p ",
            4,
            "=:",
            "assignment,layer=\nassignment,other_run=\nassignment,run=",
        ),
    ],
)
def test_bash_splits_words_at_equals_signs(
    words: str, cursor: int, breaks: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("COMP_WORDS", words), ("COMP_CWORD", str(cursor)), ("COMP_BREAKS", breaks)):
        monkeypatch.setenv(name, value)
    assert Bash(main, {}, "moewh", COMPLETE_VAR).complete() == answer


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a program `moewh` that completes like this checkout, and otherwise writes its words to $GIVEN."""
    folder = tmp_path_factory.mktemp("bin")
    file = folder / "moewh"
    file.write_text(
        f"""#!{sys.executable}
import os, sys
if {COMPLETE_VAR!r} in os.environ or sys.argv[1:2] == ["completion"]:
    sys.path.insert(0, {str(REPOSITORY)!r})
    from moewh.cli.main import main
    main()
with open(os.environ["GIVEN"], "a") as file:
    print(*sys.argv[1:], file=file)
"""
    )
    file.chmod(0o755)
    return folder


def test_completing_loads_nothing_heavy(program: Path) -> None:
    words = {"COMP_WORDS": "moewh query contrast_runs -p run =", "COMP_CWORD": "5", COMPLETE_VAR: "bash_complete"}
    command = [sys.executable, "-X", "importtime", str(program / "moewh")]
    done = subprocess.run(command, env=os.environ | words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"plain,{run}" for run in RUNS]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click.shell_completion" in loaded
    assert not loaded & {"torch", "duckdb", "pyarrow", "numpy", "rich"}


SHELLS = {
    "bash": (["bash", "--norc", "-i"], 'eval "$(moewh completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -u -D; eval "$(moewh completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "moewh completion fish | source"),
}
TYPED = {
    "moewh query load_d\t": "query load_drift",
    "moewh query contrast_runs -p oth\tmi\t": "query contrast_runs -p other_run=mixed",
    "moewh query contrast_runs -p run=step-3\t-p lay\t4": "query contrast_runs -p run=step-30 -p layer=4",
    "moewh show --run wi\t": "show --run wide.v-1",
    "moewh ingest --prompts some\t": "ingest --prompts some_prompts.jsonl",
}
"""Typed text, and the words that the command then gets."""


@pytest.mark.parametrize("shell", SHELLS)
def test_a_real_shell_completes(shell: str, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "some_prompts.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "PATH": f"{program}:{os.environ['PATH']}",
        "HOME": ".",
        "GIVEN": "given",
        "TERM": "dumb",
    }.items():
        monkeypatch.setenv(name, value)
    command, set_up = SHELLS[shell]
    type_into(command, [set_up, *TYPED, "exit"])
    assert Path("given").read_text().splitlines() == list(TYPED.values())


def type_into(command: list[str], lines: list[str]) -> None:
    """Type lines into a program in its own terminal, and wait until it ends."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    deadline = time.monotonic() + 60
    waiting = "".join(f"{line}\n" for line in lines).encode()
    with contextlib.suppress(OSError):  # when it has ended
        while time.monotonic() < deadline and os.read(terminal, 1 << 16):  # the prompt, then what is echoed
            if waiting:
                os.write(terminal, waiting)
                waiting = b""
    os.close(terminal)
    os.waitpid(process, 0)
