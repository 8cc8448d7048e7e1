"""Exporting: one run's load or routing by domain, written in another program's file format.

Each format is a file of `exports/`. It receives an `ExportedRun`, with which it queries the warehouse, and a path.
A file is written beside its target and renamed, so that a partial file is never read.
"""

from __future__ import annotations

import ast
import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.warehouse.answer.existence import require_existing
from moewh.warehouse.answer.output import replaced, written_path
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.folders import real_path
from moewh.warehouse.remote.published import Readable
from moewh.warehouse.views.opening import open_warehouse

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import numpy.typing as npt

_FORMATS = Path(__file__).resolve().parent / "exports"
_LOAD = """
    select experts.layer, list(coalesce(counted.tokens, 0) order by experts.expert)
    from experts
    left join (
        select layer, expert, sum(tokens)::bigint as tokens
        from expert_counts
        where run_id = $run and kind <> 'special' and ($domain is null or domain = $domain)
        group by all
    ) as counted using (layer, expert)
    where experts.run_id = $run
    group by experts.layer
    order by experts.layer"""


@dataclass(frozen=True)
class ExportedRun:
    """The run to export."""

    connection: duckdb.DuckDBPyConnection
    run_id: str
    domain: str | None
    num_hidden_layers: int
    top_k: int
    complete: bool
    """False if only the segments so far are exported."""

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of SQL that may bind $run and $domain."""
        given = {"run": self.run_id, "domain": self.domain}
        return self.connection.execute(sql, {key: value for key, value in given.items() if f"${key}" in sql}).fetchall()

    def load(self) -> tuple[list[int], npt.NDArray[np.int64]]:
        """Return the MoE layers, and the tokens of their experts [L, E], counting kinds prompt and generated.

        Raises MoewhError if layers have different numbers of experts, or no token was routed.
        """
        import numpy as np

        rows = self.rows(_LOAD)
        widths = sorted({len(tokens) for _, tokens in rows})
        if len(widths) > 1:
            raise MoewhError(
                f"run {self.run_id} has layers of {widths[0]} and of {widths[-1]} experts, which do not form a matrix."
            )
        tokens_LE = np.array([tokens for _, tokens in rows], np.int64)
        if not tokens_LE.any():
            raise MoewhError(f"run {self.run_id} has no routed tokens{f' in {self.domain!r}' if self.domain else ''}.")
        return [layer for layer, _ in rows], tokens_LE


@dataclass(frozen=True)
class Export:
    """One format."""

    write: Callable[[ExportedRun, Path], None]
    """Writes the run to a path that does not exist yet."""
    suffix: str | None
    """The suffix of the format's files; None if it is a folder, not a file."""


def export_names() -> list[str]:
    """Return the names of all formats, from the files of `exports/`."""
    return sorted(path.stem.replace("_", "-") for path in _FORMATS.glob("[!_]*.py"))


def describe_export(name: str) -> str:
    """Return the first line of the docstring of a format's file."""
    source = (_FORMATS / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def export_run(name: str, warehouse: Readable, run_id: str | None, domain: str | None, target: Path) -> ExportedRun:
    """Write a run in a format to `target`, replacing an existing file; return the run.

    Without `run_id`, exports the warehouse's only run. Raises UsageError if there are several, or if `target` is a
    folder, has the suffix of another format or cannot be written; MoewhError if there is no such run or domain.
    """
    found: Export = import_module(f"moewh.warehouse.answer.exports.{name.replace('-', '_')}").EXPORT
    if target.is_dir():
        raise UsageError(f"{target} is an existing folder. Choose another -o.")
    written_path(target, (found.suffix,) if found.suffix else ())
    if not found.suffix and target.exists():
        raise UsageError(f"{target} is a file, and {name} is a folder of files. Choose another -o.")
    with open_warehouse(warehouse) as connection:
        run = _find_run(connection, run_id, domain)
        with replaced(target) if found.suffix else _new_folder(target) as part:
            found.write(run, part)
    return run


def _find_run(connection: duckdb.DuckDBPyConnection, run_id: str | None, domain: str | None) -> ExportedRun:
    if run_id is None:
        known = [row[0] for row in connection.execute("select run_id from runs order by run_id").fetchall()]
        if len(known) != 1:
            if not known:
                raise MoewhError("there are no runs. `moewh ingest` makes one.")
            raise UsageError(f"there are {len(known)} runs. Name one with --run: {', '.join(known[:20])}.")
        run_id = known[0]
    values = {"run": run_id} | ({} if domain is None else {"domain": domain})
    require_existing(lambda sql, _: connection.execute(sql).fetchall(), {"run": "run", "domain": "domain"}, values)
    sql = "select coalesce(num_hidden_layers, max(layer) + 1), max(layers.top_k), status = 'complete' "
    sql += "from runs join layers using (run_id) where run_id = ? group by num_hidden_layers, status"
    (found,) = connection.execute(sql, [run_id]).fetchall()
    return ExportedRun(connection, run_id, domain, *found)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a path to make a folder at; on success it is renamed to `target`, on failure it is removed."""
    part = written_path(target)
    try:
        yield part
        part.replace(real_path(target))
    finally:
        shutil.rmtree(part, ignore_errors=True)
