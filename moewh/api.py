"""The Python API: query a warehouse as DuckDB relations, ingest into it, and record your own forward passes.

The functions are thin: `moewh.warehouse` and `moewh.ingest` do the work, and the latter is loaded only when needed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from moewh.warehouse.answer.engine import Engine
from moewh.warehouse.answer.query import Query, find_query, prepare
from moewh.warehouse.errors import MoewhError, UsageError, brief, naming_arguments, with_arguments
from moewh.warehouse.remote.published import readable, writable
from moewh.warehouse.runs import LIST_SQL
from moewh.warehouse.trust.published import check_any, plan_any
from moewh.warehouse.trust.verify import Fault
from moewh.warehouse.views.opening import open_warehouse

if TYPE_CHECKING:
    import duckdb

    from moewh.ingest.recorder.record import Recorder
    from moewh.ingest.run import Summary


_ARGUMENTS = {"--warehouse": "path"}
"""Arguments that open a warehouse, by the command's option."""
_ingested_in: set[int] = set()
"""The processes that ran a model: this one, and those that it was forked from."""


class Warehouse:
    """A warehouse, read through an in-memory DuckDB that has all its views.

    Threads may share it. A forked process opens it again, and a pickled one is opened again where it is loaded.
    """

    @naming_arguments(_ARGUMENTS)
    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the warehouse at a path, or a published one at a URL. Raises MoewhError if there is none."""
        self._warehouse = readable(path).require()
        self._connections: dict[int, duckdb.DuckDBPyConnection] = {}
        """By process; that of a process that this one was forked from is kept, because closing it would hang."""

    @property
    def path(self) -> Path | str:
        """The warehouse's directory; for a published one, its path or URL as text."""
        return self._warehouse.root

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The DuckDB connection, with a view for every table and canned view; in a forked process, a new one."""
        process = os.getpid()
        if process not in self._connections:
            self._connections.setdefault(process, open_warehouse(self._warehouse))  # another thread may be first
        return self._connections[process]

    def close(self) -> None:
        """Close the connection, if there is one; its relations can no longer be read."""
        if (connection := self._connections.pop(os.getpid(), None)) is not None:
            connection.close()

    def __enter__(self) -> Warehouse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Warehouse], tuple[Path | str]]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        return f"Warehouse({str(self.path)!r})"

    @naming_arguments(_ARGUMENTS)
    def sql(self, sql: str, /, **parameters: Any) -> duckdb.DuckDBPyRelation:
        """Return the result of one SQL statement; `parameters` are bound as $name and readable with getvariable.

        Every relation has a connection of its own: it keeps its parameters, and other queries, also of other threads,
        do not end what is still being read.
        """
        if not isinstance(sql, str):
            raise UsageError(
                f"sql is {brief(sql)}, which is not text. Give one SQL statement; `query` reads a .sql file."
            )
        return self._ask(Query("sql", sql), parameters)

    @naming_arguments(_ARGUMENTS)
    def query(self, name: str | os.PathLike[str], /, **parameters: Any) -> duckdb.DuckDBPyRelation:
        """Return the result of a canned view, a saved query or a `.sql` file.

        Raises UsageError for an unknown name or parameter, MoewhError for a run or layer that does not exist.
        """
        if not isinstance(name, str | os.PathLike):
            raise UsageError(f"the query is {brief(name)}. Give the name of a view or saved query, or a .sql file.")
        query = find_query(os.fspath(name))
        if absent := next((name for name, value in parameters.items() if value is None), None):
            raise UsageError(f"{absent} is None. Give a value, or leave it out.")
        return self._ask(query, {name: _ids(value) for name, value in parameters.items()})

    @naming_arguments(_ARGUMENTS)
    def runs(self) -> duckdb.DuckDBPyRelation:
        """Return one row per run, oldest first."""
        import duckdb

        try:
            return self.connection.cursor().sql(LIST_SQL)
        except duckdb.Error:
            self._warehouse.require()  # raises if it was deleted since
            raise

    @naming_arguments(_ARGUMENTS)
    def verify(self) -> list[Fault]:
        """Compare every file with its manifest and return the faults; empty if everything is as committed."""
        return check_any(plan_any(self._warehouse))

    def _ask(self, query: Query, given: dict[str, Any]) -> duckdb.DuckDBPyRelation:
        import duckdb

        parameters = {name: _plain(value) for name, value in given.items()}
        engine = Engine(lambda asked, values: prepare(self.connection.cursor(), asked, values))
        try:
            answer = engine(query, parameters)
            assert answer is not None  # None only for an unsafe statement
            return answer.relation()
        except (duckdb.Error, UnicodeEncodeError):
            self._warehouse.require()  # raises if it was deleted since
            for name, value in parameters.items():
                _require_value(name, value)
            raise


def _plain(value: Any) -> Any:
    """Return a value as DuckDB takes it.

    That is: numpy's scalars as numbers; arrays, series and ranges as lists, within lists too; texts as such, also
    enums; and paths as texts.
    """
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return str.__str__(text) if isinstance(text, str) else text
    as_list = getattr(value, "tolist", None) or getattr(value, "to_list", None)
    return value if as_list is None else as_list()


def _require_value(name: str, value: Any) -> None:
    """Raise UsageError for a value that DuckDB has no type for, also within lists."""
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        _require_value(name, item)
    known = (*(bool, int, float, str, bytes, list, dict), *(date, time, timedelta, Decimal, UUID))
    fits = value is None or isinstance(value, known) or type(value).__name__ in ("NAType", "NaTType")
    fits = fits and not (isinstance(value, int) and not -(2**127) <= value < 2**128)
    fits = fits and not (isinstance(value, str) and value.encode(errors="replace").decode() != value)
    if not fits:
        raise UsageError(
            f"{name} is {brief(value)}, which SQL has no type for. Give a number, a text, a time or a list."
        )


def _ids(value: Any) -> Any:
    """Return a list of whole numbers as a query takes it: 3,17."""
    value = _plain(value)
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return ",".join(map(str, value))
    return value


def open(path: str | os.PathLike[str] = "wh") -> Warehouse:
    """Open the warehouse at `path`: a directory, or the s3://, hf://datasets/ or https:// URL of a published one.

    Raises MoewhError if there is none.
    """
    return Warehouse(path)


def ingest(
    model: Any,
    prompts: str | os.PathLike[str] | Iterable[Any] | None,
    warehouse: str | os.PathLike[str] = "wh",
    run_id: str | None = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Summary:
    """Run prompts through a model, record their routing, and return what was written, like `moewh ingest`.

    `model` is a hub id, a folder, or a model in memory, which needs its `tokenizer` and is left unchanged. `prompts` is
    the path of a file or folder, a list of `Path`s, or any iterable of records: strings, or dicts with the columns of a
    prompts file (text, messages or input_ids; domain; source; all others are metadata). It is None with a `dataset`.
    `options` are those of the command, such as max_length=512, generate=16.
    Raises UsageError or MoewhError; committed segments stay.
    """
    from moewh.ingest.model.in_memory import borrowed, model_in_memory
    from moewh.ingest.processes import this_process
    from moewh.ingest.prompts.in_memory import in_memory
    from moewh.ingest.recorder.arguments import (
        argument_names,
        as_arguments,
        ingest_options,
        prompt_paths,
        refuse_file_options,
        with_tokenizer,
    )
    from moewh.ingest.run import Progress
    from moewh.ingest.run import ingest as run

    with as_arguments():
        _refuse_after_fork()
        paths = prompt_paths(prompts)
        named = model if isinstance(model, str | os.PathLike) else type(model).__name__
        asked = ingest_options(os.fspath(named), paths, run_id, options, in_files=prompts is None)
        layout = writable(warehouse)
        records = in_memory(prompts) if not paths and isinstance(prompts, Iterable) else None
        if records is not None and asked.dataset is not None:
            raise UsageError("a dataset cannot be combined with prompts in memory. Give one of them.")
        progress = Progress(warn=lambda text: warnings.warn(with_arguments(text, argument_names()), stacklevel=2))
        if isinstance(model, str | os.PathLike):
            asked = asked if tokenizer is None else with_tokenizer(asked, tokenizer)
            return run(asked, layout, progress, this_process(), records=records)
        refuse_file_options(options)
        described: dict[str, Any] = {
            "series": asked.series,
            "train_step": asked.train_step,
            "train_tokens": asked.train_tokens,
        }
        loaded = model_in_memory(model, tokenizer, **described, generates=bool(asked.generate))
        with borrowed(loaded.model):
            return run(asked, layout, progress, this_process(), model=loaded, records=records)


def _refuse_after_fork() -> None:
    """Raise MoewhError in a process forked from one that ran a model: it would wait for torch's threads forever."""
    import torch

    if _ingested_in - {os.getpid()} and torch.get_num_threads() > 1:
        raise MoewhError(
            "this process was forked after a model ran, and torch's threads do not survive that. Start processes with "
            "multiprocessing's method `spawn`, or set OMP_NUM_THREADS=1."
        )
    _ingested_in.add(os.getpid())


def record(
    model: Any,
    tokenizer: Any,
    warehouse: str | os.PathLike[str] = "wh",
    run_id: str | None = None,
    **options: Any,
) -> Recorder:
    """Record every forward pass that your code makes with a model in a `with` block: see `Recorder`.

    Raises UsageError for an unknown option.
    """
    from moewh.ingest.recorder.arguments import require_recordable
    from moewh.ingest.recorder.record import Recorder

    require_recordable(options)
    return Recorder(model, tokenizer, writable(warehouse), run_id, **options)
