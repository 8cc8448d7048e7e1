"""The documents as they must be: README commands with their real output, and the pages made from the SQL.

`python -m tests.documents` (`make docs`) writes them; the tests compare. A README block that starts with
```console is run line by line in an empty folder; other blocks are not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ingest import demo
from tests import families_page
from warehouse.catalog import describe_views
from warehouse.schema import TABLES

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
SCHEMA_PAGE = REPOSITORY / "docs" / "schema.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LOSSES = re.compile(r"^\| domain \|.*?(?=^$)", re.MULTILINE | re.DOTALL)


def console_blocks(text: str) -> list[list[tuple[str, str]]]:
    """Return each console block as its commands with the output shown for them."""
    blocks = []
    for block in _BLOCK.findall(text):
        parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
        blocks.append(list(zip(parts[::2], parts[1::2], strict=True)))
    return blocks


def run_command(command: str, folder: Path) -> str:
    """Run a README command in `folder` with this environment's programs first; return what a person sees of it."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }
    # Of `moewh demo` the answers are shown, not its progress.
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
    if done.returncode not in (0, 141):  # 141: head had seen enough
        raise RuntimeError(f"{command} exited with {done.returncode}: {done.stdout}")
    return done.stdout


def loss_table() -> str:
    """Return the README's table of what the embedded model learned."""
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
    """Return the page of every table and view with its columns, made from the schema and the SQL comments."""
    lines = [
        "# Tables and views",
        "",
        "Made by `make docs` from `warehouse/schema.py` and the comments in `queries/views/`; in a shell,",
        f"`from duckdb_columns()` tells the same. The first {len(TABLES)} are stored in Parquet, the last of these are",
        "rollups: counts of a segment's rows. The rest are canned views.",
    ]
    for view in describe_views().values():
        lines += ["", f"## {view.name}", "", view.comment, "", "| column | type | meaning |", "|---|---|---|"]
        lines += [
            f"| `{column.name}` | {column.type} | {column.comment.replace('|', chr(92) + '|')} |"
            for column in view.columns
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write every document anew."""
    SCHEMA_PAGE.parent.mkdir(exist_ok=True)
    SCHEMA_PAGE.write_text(schema_page())
    README.write_text(readme(README.read_text()))
    families_page.main()
    print(json.dumps([str(path.relative_to(REPOSITORY)) for path in (SCHEMA_PAGE, README, families_page.PAGE)]))


if __name__ == "__main__":
    main()
