"""Generate the documents: README commands with their real output, and the pages made from the SQL.

`python -m tools.documents` (`make docs`) writes them, and the tests compare them with the files. A README block that
starts with ```console is run line by line in an empty folder; other blocks are not run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moewh.ingest import demo
from moewh.warehouse.answer.catalog import ViewColumn, answer_columns, describe_table, describe_views
from moewh.warehouse.answer.parameters import KINDS
from moewh.warehouse.answer.query import find_query, saved_names
from moewh.warehouse.files.schema import TABLES, TOTALS
from moewh.warehouse.trust.check import shipped_checks
from moewh.warehouse.views.shipped import canned_names
from tools import families_page

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
SCHEMA_PAGE = REPOSITORY / "docs" / "schema.md"
VIEWS_PAGE = REPOSITORY / "docs" / "views.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LOSSES = re.compile(r"^\| domain \|.*?(?=^$)", re.MULTILINE | re.DOTALL)


def console_blocks(text: str) -> list[list[tuple[str, str]]]:
    """Return each console block as its commands, each with the output shown for it."""
    blocks = []
    for block in _BLOCK.findall(text):
        parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
        blocks.append(list(zip(parts[::2], parts[1::2], strict=True)))
    return blocks


def run_command(command: str, folder: Path, programs: Path | None = None) -> str:
    """Run a README command in `folder` and return its visible output.

    The programs in the folder `programs` come first on PATH, then those of this environment.
    """
    first = [str(path) for path in (programs, Path(sys.executable).parent) if path]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([*first, os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }
    # For `moewh demo`, the results are shown but not the progress.
    errors = subprocess.DEVNULL if command == "moewh demo" else subprocess.STDOUT
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode not in (0, 141):  # 141: SIGPIPE from head
        raise RuntimeError(f"{command} exited with {done.returncode}: {done.stdout}")
    return done.stdout


def loss_table() -> str:
    """Return the README's table of the embedded model's losses."""
    rows = [
        f"| {domain} | {fact['loss']:.2f} | {fact['bigram_loss']:.2f} |"
        for domain, fact in demo.facts()["domains"].items()
    ]
    return "\n".join(["| domain | model | bigram |", "|---|---|---|", *rows]) + "\n"


def readme(text: str) -> str:
    """Return the README with every command's real output and the real losses."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [
            "".join(f"$ {command}\n{run_command(command, Path(folder))}" for command, _ in block)
            for block in console_blocks(text)
        ]
    written = iter(outputs)
    text = _BLOCK.sub(lambda _: f"```console\n{next(written)}```", text)
    return _LOSSES.sub(lambda _: loss_table(), text)


def schema_page() -> str:
    """Return the page of every stored table and its columns, from the schema."""
    lines = [
        "# Tables",
        "",
        "Made by `make docs` from `warehouse/files/schema.py`; in a shell, `from duckdb_columns()` shows the same.",
        "Each table is a Parquet file in every run's or segment's folder, and a view over all of them. Tables whose",
        "description begins with Rollup hold counts of a segment's rows, which the [canned views](views.md) read. The",
        "last ones belong to sealed runs; for other runs, the views of these names add up the rollups.",
    ]
    for table in (*TABLES, *TOTALS):
        view = describe_table(table)
        lines += ["", f"## {view.name}", "", view.comment, "", *_column_table(view.columns)]
    return "\n".join(lines) + "\n"


def views_page() -> str:
    """Return the page of every canned view, saved query and check, from the SQL's headers and comments."""
    lines = [
        "# Views, saved queries and checks",
        "",
        "Made by `make docs` from `queries/`: the header of each file, and the comments on its columns.",
        "[metrics.md](metrics.md) has the sources of the formulas, and their values under pure chance.",
        "",
        "# Canned views",
    ]
    for name in canned_names():
        view = describe_views()[name]
        lines += ["", f"## {name}", "", view.comment, *_header(view.header), *_column_table(view.columns)]
    lines += [
        "",
        "# Saved queries",
        "",
        "`moewh query NAME -p parameter=value`; in a plain shell, `set variable parameter = value;`, then the file.",
        "",
        "The word in parentheses after a parameter is its kind. It decides the type of the value, and whether it must",
        "exist in the warehouse. The header of your own file declares its parameters in the same way. The kinds:",
        f"{', '.join(f'`{kind}`' for kind in KINDS)}.",
    ]
    for name in saved_names():
        query = find_query(name)
        columns = ", ".join(f"`{column.name}`" for column in answer_columns(query))
        lines += ["", f"## {name}", *_header(query.header), f"Columns: {columns}."]
    lines += ["", "# Checks", "", "`moewh check` runs them all. A check's rows are faults."]
    for query in shipped_checks():
        lines += ["", f"## {query.source.removesuffix('.sql')}", *_header(query.header)[:-1]]
    return "\n".join(lines) + "\n"


def _header(header: str) -> list[str]:
    """Return the header of an SQL file, with its formulas inline."""
    return ["", "```text", *header.splitlines(), "```", ""]


def _column_table(columns: Iterable[ViewColumn]) -> list[str]:
    rows = [f"| `{column.name}` | {column.type} | {column.comment.replace('|', chr(92) + '|')} |" for column in columns]
    return ["| column | type | meaning |", "|---|---|---|", *rows]


def main() -> None:
    """Rewrite every document."""
    SCHEMA_PAGE.parent.mkdir(exist_ok=True)
    SCHEMA_PAGE.write_text(schema_page())
    VIEWS_PAGE.write_text(views_page())
    README.write_text(readme(README.read_text()))
    families_page.main()
    print(
        json.dumps(
            [str(path.relative_to(REPOSITORY)) for path in (SCHEMA_PAGE, VIEWS_PAGE, README, families_page.PAGE)]
        )
    )


if __name__ == "__main__":
    main()
