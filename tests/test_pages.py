"""The hand-written pages: every file, folder, test and link in them exists, and their Python examples run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import moewh
from moewh.ingest import demo
from moewh.warehouse.files.layout import Layout
from tests.support.synthetic import random_run, write_run

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (
    *("README.md", "SECURITY.md", "docs/architecture.md", "docs/reliability.md"),
    *("docs/publish.md", "docs/report.md", "docs/spark.md", "docs/geometry.md", "docs/metrics.md"),
    *("docs/papers.md", "docs/pruning.md", "docs/python.md"),
)
_ROOMS = "moewh|notebooks|ingest|warehouse|queries|tests|tools|benchmarks|docs"
_PATH = re.compile(rf"(?<![\w./-])(?:{_ROOMS})/[\w./*-]*[\w/]")
_TEST = re.compile(r"(?<![\w/])test_\w+\.py")
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^ *```(?!text).*?^ *```$", re.MULTILINE | re.DOTALL)
"""Commands that a user types, in their own folder."""
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def missing(page: str, folder: Path) -> list[str]:
    """Return paths from the root, links from `folder`, and test files without a folder in `page` that do not exist."""
    page = _COMMANDS.sub("", page)
    paths = [path for path in _PATH.findall(page) if not any(REPOSITORY.glob(path.rstrip("/")))]
    links = [link for link in _LINK.findall(page) if not (folder / link).exists()]
    return [*paths, *links, *_TEST.findall(page)]


@pytest.mark.parametrize("name", PAGES)
def test_page_names_what_is_there(name: str) -> None:
    assert missing((REPOSITORY / name).read_text(), (REPOSITORY / name).parent) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `ingest/run.py` and tests/", []),
        ("see `ingest/walk.py`.", ["ingest/walk.py"]),
        ("see [this](docs/none.md)", ["docs/none.md", "docs/none.md"]),
        ("`test_jail.py` without its folder", ["test_jail.py"]),
        ("https://host/docs/x and wh/tests/y", []),
    ],
)
def test_a_name_of_nothing_is_seen(text: str, found: list[str]) -> None:
    assert missing(text, REPOSITORY) == found


def test_architecture_names_every_room() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rooms = [f"moewh/{name}" for name in ("cli", "api.py")] + [
        f"{folder.parent.name}/{folder.name}"
        for top in ("ingest", "warehouse", "queries")
        for folder in sorted((REPOSITORY / top).iterdir())
        if folder.is_dir() and any(folder.glob("*.*")) and folder.name not in ("__pycache__", "demo", "geometry")
    ]
    assert [room for room in rooms if room not in page and f"`{Path(room).name}/`" not in page] == []


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    write_run(layout, random_run("007", 1, {0: (6, 2), 2: (6, 2)}))
    monkeypatch.chdir(tmp_path)
    (block,) = _PYTHON.findall((REPOSITORY / "README.md").read_text())
    names: dict[str, Any] = {}
    exec(block, names)
    assert {"run_id", "layer", "expert", "tokens"} <= set(names["load"].columns)
    assert names["pairs"].fetchall()


def test_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example, one after another, beside a model's folder."""
    shutil.copytree(demo.checkpoint_path(None), tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in _PYTHON.findall((REPOSITORY / "docs" / "python.md").read_text()):
        exec(block, names)
    warehouse = names["warehouse"]
    status = dict(warehouse.sql("select run_id, status from runs").fetchall())
    trained = {f"trained-step{step}" for step in (0, 2, 4)}
    assert set(status) == {"base", "in-memory", "steered", "recorded", "from-elsewhere", *trained}
    assert set(status.values()) == {"complete"}
    assert names["load"].fetchall() and len(names["rows"]) == 5
    assert {row[0] for row in names["saturation"].fetchall()} >= trained
    domains = "select domain, count(*) from prompts where run_id = 'recorded' group by all order by all"
    assert warehouse.sql(domains).fetchall() == [("code", 1), ("prose", 2)]


def test_python_page_names_every_public_name() -> None:
    page = (REPOSITORY / "docs" / "python.md").read_text()
    named = set(moewh.__all__) - {"Warehouse", "__version__", "plots"} | {"plots.tokens"}
    assert [name for name in sorted(named) if not re.search(rf"(?m)^\| `moewh\.{name}[`(]", page)] == []
