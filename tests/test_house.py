"""The floor plan: who may import whom, no import circles, and libraries that a room must not load.

Rooms are folders and single files, listed from the front door down; a room imports only rooms below it. Imports inside
functions count too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = (
    "moewh.__main__",
    "moewh.cli",
    "moewh",
    "moewh.report",
    "moewh.plots",
    "moewh.api",
    "moewh.publish",
    "moewh.ingest.recorder",
    "moewh.ingest.run",
    "moewh.ingest.inspect",
    "moewh.ingest.geometry",
    "moewh.ingest.traces",
    "moewh.ingest.plan",
    "moewh.ingest.workers",
    "moewh.ingest.identity",
    "moewh.ingest.capture",
    "moewh.ingest.proof",
    "moewh.ingest.model",
    "moewh.ingest.families",
    "moewh.ingest.write",
    "moewh.ingest.prompts",
    "moewh.ingest.routing",
    "moewh.ingest.record",
    "moewh.ingest.options",
    "moewh.ingest.processes",
    "moewh.ingest.demo",
    "moewh.warehouse.trust",
    "moewh.warehouse.runs",
    "moewh.warehouse.answer",
    "moewh.warehouse.sealing",
    "moewh.warehouse.views",
    "moewh.warehouse.remote",
    "moewh.warehouse.files",
    "moewh.warehouse.stopping",
    "moewh.warehouse.cpus",
    "moewh.warehouse.errors",
    "moewh.warehouse",
    "moewh.ingest",
)
"""From the front door down. The last two are what a package itself holds: its version, its legend of shapes."""
FORBIDDEN = {
    "moewh.warehouse": {"torch", "transformers", "click", "rich", "huggingface_hub"},
    "moewh.ingest": {"click", "rich"},
    "moewh.report": {"torch", "transformers", "click", "rich"},
    "moewh.plots": {"torch", "transformers", "click", "rich"},
    "moewh.ingest.write": {"torch", "transformers", "tokenizers"},
    "moewh.ingest.record": {"torch", "transformers", "tokenizers"},
    "moewh.ingest.routing": {"torch", "transformers", "tokenizers"},
}
"""Libraries that a room must not import."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    files = [path for folder in ("ingest", "warehouse") for path in (REPOSITORY / folder).rglob("*.py")]
    named = {".".join(("moewh", *path.relative_to(REPOSITORY).with_suffix("").parts)): path for path in files}
    door = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
        for pattern in ("*.py", "cli/*.py", "plots/**/*.py", "publish/*.py", "report/*.py")
        for path in (REPOSITORY / "moewh").glob(pattern)
    }
    return {name.removesuffix(".__init__"): path for name, path in (named | door).items()}


def imports(path: Path, known: set[str]) -> set[str]:
    """Yield a file's imports: our own modules where known, else the library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found


def room(module: str) -> str:
    """Return a module's room, the longest one that is a prefix of its name."""
    return max((name for name in ROOMS if module == name or module.startswith(name + ".")), key=len)


def wrong_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return imports that go up, or into a library that the room must not import."""
    wrong = []
    for module, imported in sorted(graph.items()):
        for name in sorted(imported):
            ours = name == "moewh" or name.startswith("moewh.")
            if ours and ROOMS.index(room(name)) < ROOMS.index(room(module)):
                wrong.append(f"{module} imports {name}, which stands above it")
            for place, libraries in FORBIDDEN.items():
                inside = module == place or module.startswith(place + ".")
                if inside and not ours and name.partition(".")[0] in libraries:
                    wrong.append(f"{module} imports {name}")
    return wrong


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known)) for name, path in known.items()}


def test_every_file_is_in_a_room() -> None:
    """A new file or folder of `ingest/` or `warehouse/` has its line in ROOMS."""
    packages = {"moewh.ingest", "moewh.warehouse"}
    assert [name for name in modules() if room(name) in packages and name not in packages] == []


def test_imports_go_down(graph: dict[str, set[str]]) -> None:
    assert wrong_imports(graph) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("moewh.warehouse.views.base", "moewh.ingest.options"),
        ("moewh.warehouse.answer.query", "torch"),
        ("moewh.warehouse.files.schema", "moewh.warehouse.answer.query"),
        ("moewh.ingest.write.segment", "transformers"),
        ("moewh.ingest.run", "moewh.cli.progress"),
        ("moewh.ingest.record", "moewh.ingest.identity"),
        ("moewh.warehouse.trust.check", "click"),
    ],
)
def test_a_wrong_import_is_seen(module: str, name: str, graph: dict[str, set[str]]) -> None:
    assert any(name in line for line in wrong_imports({**graph, module: graph[module] | {name}}))


def test_no_file_imports_in_a_circle(graph: dict[str, set[str]]) -> None:
    ours = {
        name: {other for other in imported if other in graph and other != "moewh"} for name, imported in graph.items()
    }
    TopologicalSorter(ours).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter({**ours, "moewh.warehouse.errors": {"moewh.cli.main"}}).prepare()


def test_no_test_module_imports_another() -> None:
    known = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
        for path in (*(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "tools").rglob("*.py"))
    }
    wrong = [
        f"{module} imports {name}"
        for module, path in known.items()
        for name in imports(path, set(known))
        if name.rpartition(".")[2].startswith("test_")
    ]
    assert wrong == []


def names_of_properties() -> set[str]:
    """The names of all properties: reading one runs code."""
    functions = (
        node
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    decorators = ("property", "cached_property")
    return {
        function.name
        for function in functions
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Name) and decorator.id in decorators
    }


def asserts_that_do_something(path: Path, properties: set[str]) -> list[str]:
    """Return the asserts of a file that call a function or read a property: `python -O` removes them."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
        for part in ast.walk(node.test)
        if isinstance(part, ast.Call) or (isinstance(part, ast.Attribute) and part.attr in properties)
    ]


def test_no_assert_does_something(tmp_path: Path) -> None:
    properties = names_of_properties()
    assert [line for path in modules().values() for line in asserts_that_do_something(path, properties)] == []
    (tmp_path / "wrong.py").write_text(
        "assert self.listing is not None\nassert check(text)\nassert found is not None\n"
    )
    assert len(asserts_that_do_something(tmp_path / "wrong.py", properties)) == 2


def test_refusals_under_python_O(tmp_path: Path) -> None:
    """What users give is checked without asserts, too."""
    (tmp_path / "published.json").write_text("{}")
    code = f"""
import moewh
from moewh.publish.find import target_at
for refuse in (lambda: moewh.open({str(tmp_path)!r}), lambda: target_at("hf://datasets/org/name/more")):
    try:
        refuse()
    except moewh.MoewhError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    bad_listing, more = done.stdout.splitlines()
    assert "does not state its format" in bad_listing
    assert "more than a data set" in more


@pytest.mark.parametrize("module", ["moewh", "moewh.ingest.write.segment", "moewh.ingest.write.run_files"])
def test_the_writer_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'click', 'rich'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with files named like our rooms, each of which ends the process that imports it."""
    for name in ("ingest", "queries", "warehouse"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("hostile")\n')
    return tmp_path


def run_in(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a folder, which Python then searches first."""
    path = os.pathsep.join(("", str(REPOSITORY)))
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_import_beside_files_of_our_rooms_names(hostile: Path) -> None:
    """Every module, from a folder whose own `ingest.py` would be found first."""
    every = "; ".join(f"import {module}" for module in sorted(modules()))
    done = run_in(hostile, f"import moewh; moewh.open; {every}; print('done')")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert run_in(hostile, "import ingest").stderr == "hostile\n", "it would have been noticed"


def test_command_beside_files_of_our_rooms_names(hostile: Path) -> None:
    done = run_in(hostile, "from moewh.cli.main import main; main()", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ingest" in done.stdout


def test_the_public_names_are_listed_before_they_are_loaded() -> None:
    """As completion in a notebook lists them."""
    code = "import moewh, sys; print(set(moewh.__all__) <= set(dir(moewh)), 'moewh.api' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
