"""The card of a published warehouse, `README.md`: how to read it, its runs, and the meaning of every column.

Its YAML makes each table a configuration with one split per run, because a reader of single files does not see the run
in their path. The Hub's viewer and `datasets.load_dataset` use it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from moewh.warehouse.files import schema
from moewh.warehouse.files.listing import run_of
from moewh.warehouse.files.names import ANY_RUN, DATABASE, FOLDERS, LISTING, RUN_FOLDER, SCHEMA_RUN
from moewh.warehouse.remote.listed import ListedFiles
from moewh.warehouse.remote.place import is_url
from moewh.warehouse.remote.published import Published
from moewh.warehouse.views.base import base_views
from moewh.warehouse.views.sql import sql_string

_DEFAULT = schema.ROUTING
"""The table shown first."""
_RUNS = """
select
    run_id, model, coalesce(commit_hash, revision) as revision, origin, dtype, device, prompts, tokens, segments,
    moewh_version, torch_version, transformers_version, created_at
from runs
order by run_id
"""
_READ_BY_RUNS = (schema.SEGMENTS.name, schema.RUNS.name)
"""The views that it reads. Creating all of them takes longer than the rest of the card."""
_READ = """\
Routing decisions of Mixture-of-Experts language models, recorded by moewh: which experts each token
was sent to, at which layer and with which weight, as Parquet files that answer SQL.

## Read it

In any DuckDB shell, every table and canned view{secret}:

```sql
{httpfs}ATTACH {database} AS wh (READ_ONLY);
FROM wh.expert_load LIMIT 10;
```

A copy of these files is read after `SET VARIABLE moewh_root = 'FOLDER'`, the path of the copy.

With `pip install 'moewh[remote]'`:

```sh
moewh query expert_load --warehouse {root}
```

With `datasets`, {unit}:

```python
from datasets import load_dataset

load_dataset({dataset})
```
"""
_HTTPFS = "INSTALL httpfs;\nLOAD httpfs;\n"
_SECRET = " (a bucket that is not public needs `CREATE SECRET (TYPE s3, PROVIDER credential_chain);` first)"
_WITHOUT_TEXT = """
## Without text

{runs} published without the text of prompts: `prompts.text`, `source` and `metadata`, `vocab_id` and `token` of every
token, counts by vocabulary entry and hidden states are left out. Numbers of prompts and tokens, domains, positions,
kinds of tokens and all routing remain. Routing weights are exact: whoever has the model can find a text out by trying
tokens until the weights agree. Do not take this for anonymous.
"""


def card(published: Published, license: str | None) -> str:
    """Return the card for the runs of a listing. Raises MoewhError if they cannot be read."""
    import duckdb

    with duckdb.connect() as connection:
        connection.register_filesystem(ListedFiles(published.place, published.listing))
        for view in (view for view in base_views(published) if view.name in _READ_BY_RUNS):
            connection.execute(view.create)
        found = connection.execute(_RUNS)
        names = [name for name, *_ in found.description or ()]
        runs = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    root = published.listing.root
    splits = split_names([run["run_id"] for run in runs])
    parts = [
        "---",
        *_front(published, splits, license),
        "---",
        "",
        f"# {_cell(root.rpartition('/')[2])}",
        "",
        _how_to_read(published, splits),
        "## Runs",
        "",
        *_table(["split", *names], [[splits[run["run_id"]], *run.values()] for run in runs]),
    ]
    if held := [run_id for run_id in published.listing.without_text if run_id in published.listing.run_ids]:
        parts.append(_WITHOUT_TEXT.format(runs=f"Run{'s'[: len(held) != 1]} {', '.join(held)} {_was(len(held))}"))
    parts += ["", "## Tables", ""]
    for table in (*schema.TABLES, *schema.TOTALS):
        parts += [f"### {table.name}", "", table.description, ""]
        parts += [
            *_table(["column", "type", "meaning"], [[c.name, c.type, c.description] for c in table.viewed]),
            "",
        ]
    return "\n".join(parts)


def _how_to_read(published: Published, splits: dict[str, str]) -> str:
    """Return the code that reads a place. `datasets` finds splits in a folder and on the Hub only, elsewhere files."""
    root, first = published.listing.root, published.listing.files_of(_DEFAULT)[0]
    if is_url(root) and not root.startswith("hf://"):
        unit = f"one file at a time; `{LISTING}` lists them"
        dataset = f'"parquet", data_files={_literal(f"{root}/{first}")}, split="train"'
    else:
        unit = "one table of one run at a time; each run is a split"
        name, split = root.removeprefix("hf://datasets/"), splits.get(run_of(first), "RUN")
        dataset = f"{_literal(name)}, {_literal(_DEFAULT.name)}, split={_literal(split)}"
    return _READ.format(
        secret=_SECRET if root.startswith("s3://") else "",
        httpfs=_HTTPFS if is_url(root) else "",
        database=sql_string(f"{root}/{DATABASE}"),
        root=shlex.quote(root),
        unit=unit,
        dataset=dataset,
    )


def _literal(text: str) -> str:
    """Return a Python string. JSON escapes a character beyond U+FFFF as two."""
    return json.dumps(text, ensure_ascii=False)


def is_card(text: str) -> bool:
    """Return whether a README.md is a card that moewh wrote, by the first of its tags."""
    return re.search(r'^tags: \["moewh"', _front_of(text), re.MULTILINE) is not None


def license_of(text: str) -> str | None:
    """Return the licence that a card names; None if it names none."""
    found = re.search(r"""^license: *["']?([^\s"']+)""", _front_of(text), re.MULTILINE)
    return found[1] if found else None


def _front_of(text: str) -> str:
    """Return the YAML at the start of a README.md, which may be empty."""
    found = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def split_names(run_ids: list[str]) -> dict[str, str]:
    """Return a split name for each run: `datasets` allows letters, digits, `_`, and dots between them.

    Runs that would share a name all get one with a digest, so that a name never passes from one run to another.
    """
    names = {run_id: re.sub(r"\W+", "_", run_id) for run_id in run_ids}
    for run_id, name in names.items():
        if name.lower() == "all":  # which `datasets` takes to mean every split
            names[run_id] = f"{name}_"
    shared = Counter(names.values())
    return {
        run_id: name if shared[name] == 1 else f"{name}_{sha256(run_id.encode()).hexdigest()[:8]}"
        for run_id, name in names.items()
    }


def _front(published: Published, splits: dict[str, str], license: str | None) -> Iterator[str]:
    """Yield the lines of the YAML. Strings are quoted as in JSON, which YAML reads the same way."""
    if license is not None:
        yield f"license: {json.dumps(license)}"
    yield 'tags: ["moewh", "mixture-of-experts", "routing", "interpretability"]'
    yield "configs:" if splits else "configs: []"
    for table in (*schema.TABLES, *schema.TOTALS):
        stored = schema.sealed(table) if table in schema.MERGED else table
        runs = sorted({run_of(path) for path in published.listing.files_of(table)} - {SCHEMA_RUN})
        if not runs:
            continue
        yield f"- config_name: {json.dumps(table.name)}"
        if table is _DEFAULT:
            yield "  default: true"
        yield "  data_files:"
        for run_id in runs:
            yield f"  - split: {json.dumps(splits[run_id])}"
            folder = FOLDERS[stored.level].replace(ANY_RUN, f"{RUN_FOLDER}{run_id}")
            yield f"    path: {json.dumps(f'{folder}/{table.file}')}"


def _table(names: list[str], rows: list[list[Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(_cell(value) for value in row)} |"


def _cell(value: Any) -> str:
    """Return a value as a table cell: markup is escaped, and characters without a glyph are named."""
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())
    text = "".join(character if character.isprintable() else f"U+{ord(character):04X}" for character in text)
    return re.sub(r"([\\|<>\[\]*`&~])", r"\\\1", text)


def _was(number: int) -> str:
    return "was" if number == 1 else "were"
