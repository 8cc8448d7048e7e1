"""Every view, saved query and check in older releases of DuckDB: `python -m tools.old_shells [VERSION…]`.

The README promises that `warehouse.duckdb` opens in any DuckDB shell from 1.1 on, and the tests run only two releases.
Each version is installed into a temporary folder, and answers from two warehouses: a random one with sealed and
unsealed runs, and one of the embedded model, which has more rows, so that DuckDB plans as it does for real ones. Its
rows are compared with those of the installed DuckDB. Exit code 1 for any difference, error, or query of more than a
minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from moewh.ingest.options import IngestOptions
from moewh.ingest.run import ingest
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.views.publishing import publish
from moewh.warehouse.views.shipped import QUERIES
from moewh.warehouse.views.sql import sql_string
from tests.support.saved_queries import values_of
from tests.support.synthetic import random_warehouse

Answers = dict[str, list[str] | str]
"""Name of a query → its rows as text, sorted, or its error."""
VERSIONS = ("1.1.3", "1.2.2", "1.3.2", "1.4.4", "1.5.6")
_SECONDS = 60
_ASK = f"""
import duckdb, json, sys, threading
connection = duckdb.connect(sys.argv[1], read_only=True)
views = [name for (name,) in connection.execute("select view_name from duckdb_views() where not internal").fetchall()]
asked = [(name, [], f"from {{name}}") for name in views] + json.load(sys.stdin)
for name, settings, sql in asked:
    timer = threading.Timer({_SECONDS}, connection.interrupt)
    timer.start()
    try:
        for setting in settings:
            connection.execute(setting)
        rows = connection.execute(sql).fetchall()
        shown = sorted("|".join(f"{{v:.7g}}" if isinstance(v, float) else str(v) for v in row) for row in rows)
    except Exception as error:
        shown = f"{{type(error).__name__}}: {{error}}"
    timer.cancel()
    print(json.dumps([name, shown]), flush=True)
"""
"""Answers of whatever DuckDB is importable; a line for each query."""


def main() -> None:
    """Print a line per version and warehouse, and one per difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    versions = parser.parse_args().versions
    differences = 0
    with tempfile.TemporaryDirectory() as folder:
        asked = {_random(Path(folder) / "random"): _files(), _embedded(Path(folder) / "embedded"): []}
        expected = {layout: _answers(layout, files, None) for layout, files in asked.items()}
        for version in versions:
            packages = Path(folder) / version
            install = ["pip", "install", "--quiet", "--no-deps", "--target", str(packages), f"duckdb=={version}"]
            subprocess.run([sys.executable, "-m", *install], check=True)
            for layout, files in asked.items():
                differences += _compare(version, layout, expected[layout], _answers(layout, files, packages))
    sys.exit(differences > 0)


def _random(root: Path) -> Layout:
    layout, runs = random_warehouse(root)
    for run in runs[::2]:
        seal(layout, run.run_id)
    publish(layout)
    return layout


def _embedded(root: Path) -> Layout:
    layout = Layout(root)
    for revision in ("step-000400", "step-002000"):
        ingest(IngestOptions(model="demo", prompts=("demo",), revision=revision, limit=60), layout)
    return layout


def _files() -> list[tuple[str, list[str], str]]:
    """Return the saved queries, with parameters for which they have rows in the random warehouse, and the checks."""
    files = [(path, values_of(path.stem)) for path in sorted((QUERIES / "saved").glob("*.sql"))]
    files += [(path, {}) for path in sorted((QUERIES / "checks").glob("*.sql"))]
    return [
        (
            f"{path.parent.name}/{path.name}",
            [f"set variable {name} = {sql_string(v) if isinstance(v, str) else v}" for name, v in values.items()],
            path.read_text(),
        )
        for path, values in files
    ]


def _answers(layout: Layout, files: list[tuple[str, list[str], str]], packages: Path | None) -> Answers:
    """Return the rows, or the error, of each view and file, from the DuckDB in a folder or from the installed one."""
    command = [sys.executable, "-c", _ASK, str(layout.database)]
    environment = dict(os.environ) if packages is None else {**os.environ, "PYTHONPATH": str(packages)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        try:
            output, _ = asking.communicate(json.dumps(files), timeout=10 * _SECONDS)
        except subprocess.TimeoutExpired:  # a DuckDB that hangs may not notice an interrupt
            asking.kill()
            output, _ = asking.communicate()
    return dict(json.loads(line) for line in output.splitlines())


def _compare(version: str, layout: Layout, expected: Answers, found: Answers) -> int:
    different = [name for name in expected if found.get(name) != expected[name]]
    same = len(expected) - len(different)
    print(f"DuckDB {version}, {layout.root.name}: {same} of {len(expected)} queries give the same rows", flush=True)
    for name in different:
        shown = found.get(name, "no answer")
        print(f"  {name}: {shown[:200] if isinstance(shown, str) else 'other rows'}", flush=True)
    return len(different)


if __name__ == "__main__":
    main()
