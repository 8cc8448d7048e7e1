"""The query runner: finds a view, a saved query or the user's own SQL, and sets its parameters.

A parameter is a DuckDB variable that the SQL reads with `getvariable('name')`, so that the same file
runs in a plain shell after `set variable name = …`; a user's SQL may also bind `$name`. It is optional
if the SQL handles its absence: `coalesce(getvariable('name'), …)` or
`getvariable('name') is null`. `moewh.warehouse.answer.parameters` determines the types of values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.errors import UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.views.shipped import QUERIES, canned_views, staging_read_by, view_names

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.views.shipped import View

Value = int | float | bool | str

# Patterns are compiled on first use: most queries need none of them and start sooner.
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_VARIABLE = r"getvariable\s*\(\s*'(\w+)'\s*\)"
_OPTIONAL = rf"coalesce\s*\(\s*{_VARIABLE}|{_VARIABLE}\s+is\s+(?:not\s+)?null"
_TEXT_OR_COMMENT = (
    r"(?s)([eE]'(?:\\.|''|[^'\\])*'|'[^']*'|\"[^\"]*\"|\$(\w*)\$.*?\$\2\$)"  # a text, in which -- is no comment
    r"|--[^\r\n]*|/\*.*?\*/"
)

_SEGMENT_TABLES = (table.name for table in schema.TABLES if table.level == "segment")
_ROW_LEVEL = frozenset({"routes", "router_confidence", *_SEGMENT_TABLES})
"""Views that grow with the corpus, returned unsorted. All others are sorted, so an answer is the same each time."""


@dataclass(frozen=True)
class Query:
    """A piece of SQL and its source, as messages name it."""

    source: str
    sql: str
    shipped: bool = False
    """True for SQL that ships with moewh; False for a user's."""

    def __post_init__(self) -> None:
        """Raise UsageError for SQL that is not Unicode, as Python reads it in a locale without UTF-8, or holds NULs."""
        if not self.shipped and self.sql.encode(errors="replace").decode() != self.sql:
            raise UsageError(
                f"{self.source} is not UTF-8 text. Write it in UTF-8, and use a UTF-8 locale (LC_ALL=C.UTF-8)."
            )
        if "\0" in self.sql:
            raise UsageError(f"{self.source} holds NUL characters, as text in UTF-16 does. Write it in UTF-8.")

    @cached_property
    def code(self) -> str:
        """The SQL without its comments, which also mention variables."""
        return re.sub(_TEXT_OR_COMMENT, lambda found: found[1] or " ", self.sql)

    @cached_property
    def staging(self) -> tuple[View, ...]:
        """The staging views that this SQL reads; they may read variables too."""
        return staging_read_by(self.code)

    @cached_property
    def variables(self) -> AbstractSet[str]:
        """The names of the variables that this SQL and its staging views read with `getvariable`."""
        return frozenset(re.findall(_VARIABLE, self.code_read, re.IGNORECASE))

    @cached_property
    def required(self) -> AbstractSet[str]:
        """The variables whose absence the SQL does not handle."""
        optional = {name for pair in re.findall(_OPTIONAL, self.code_read, re.IGNORECASE) for name in pair}
        return self.variables - optional

    @property
    def code_read(self) -> str:
        """The SQL and that of its staging views."""
        return "\n".join([self.code, *(view.code for view in self.staging)])

    @cached_property
    def header(self) -> str:
        """The leading comments, without the marks of a comment."""
        found = re.match(r"(?s)(?:\s|--[^\r\n]*|/\*.*?\*/)*", self.sql)
        lines = found[0].splitlines() if found else []
        return "\n".join(re.sub(r"^\s*(--|/\*+|\*(?!/))|\*/\s*$", "", line).strip() for line in lines).strip()


@dataclass(frozen=True)
class Answer:
    """A statement that is ready to run, with the values it binds. Every call runs it."""

    connection: duckdb.DuckDBPyConnection
    statement: str | duckdb.Statement
    values: Mapping[str, Value]

    def relation(self) -> duckdb.DuckDBPyRelation:
        """Return the result as a DuckDB relation."""
        return self.connection.sql(self.statement, params=dict(self.values))

    def execute(self) -> duckdb.DuckDBPyConnection:
        """Run it and return the connection, from which rows are fetched."""
        return self.connection.execute(self.statement, dict(self.values))


def saved_names() -> tuple[str, ...]:
    """Return the names of the saved queries: the stems of the files in `queries/saved/`."""
    return tuple(sorted(path.stem for path in (QUERIES / "saved").glob("*.sql")))


def find_query(name: str) -> Query:
    """Return the view, the saved query or the `.sql` file of that name.

    A name with a slash or ending in `.sql`, in any case, is a file. Raises UsageError if there is none.
    """
    if "/" in name or name.lower().endswith(".sql"):
        return read_file(Path(name))
    if name in view_names():
        return Query(name, f"from {name}" if name in _ROW_LEVEL else f"from {name} order by all", shipped=True)
    if name in saved_names():
        return read_file(QUERIES / "saved" / f"{name}.sql", shipped=True)
    if re.search(r"\s", name.strip()):
        raise UsageError(f"{name!r} is SQL, not a query's name. Give it with -c, or in Python to `sql`.")
    if Path(f"{name}.sql").is_file():
        raise UsageError(f"there is no query {name!r}, but there is a file. Write {name}.sql.")
    raise UsageError(unknown("query", name, [*(view.name for view in canned_views()), *saved_names()]))


def unknown(kind: str, name: str, known: list[str]) -> str:
    """Return the message for a name that does not exist, with the nearest known name and all known names."""
    import difflib

    nearest = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"Did you mean {nearest[0]}? " if nearest else ""
    return f"there is no {kind} {name!r}. {hint}Known: {', '.join(known) or 'none'}."


def parse_parameters(assignments: tuple[str, ...]) -> dict[str, str]:
    """Return the values of `name=value` assignments, as text. Raises UsageError for a malformed or repeated one."""
    values: dict[str, str] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not re.fullmatch(_NAME, name):
            raise UsageError(f"-p {assignment}: write -p name=value.")
        if name in values:
            raise UsageError(f"-p {name} is given twice.")
        values[name] = parse_value(text)
    return values


def parse_value(text: str) -> str:
    """Return a value without the quotes around it, if any, with doubled quotes inside them undoubled."""
    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    return text


def prepare(
    connection: duckdb.DuckDBPyConnection, query: Query, values: Mapping[str, Value], *, unsafe: bool = False
) -> Answer | None:
    """Set the query's variables, unset those without a value, and return its answer.

    The statement runs as a subquery, which can only read (see `moewh.warehouse.answer.jail`); a user's is also checked.
    With `unsafe` a user's runs unchanged, and a statement without an answer, such as COPY, is executed at once: then
    None is returned. Raises UsageError unless there is exactly one statement, for a statement that does more than read,
    for a parameter that the SQL does not use and for a required parameter without a value.
    """
    import duckdb

    from moewh.warehouse.answer.jail import as_subquery, jailed_statement
    from moewh.warehouse.answer.pivot import make_types, name_pivots

    if query.shipped:
        check_names(query, values, frozenset())
        _set_variables(connection, query, values)
        return Answer(connection, as_subquery(query.sql), {})

    def look_into(sql: str) -> str:
        return sql if unsafe else jailed_statement(connection, query.source, sql)

    pivots = name_pivots(connection, query.source, query.sql, unsafe=unsafe)
    statement = single_statement(connection, replace(query, sql=pivots.sql))
    bound = frozenset(statement.named_parameters)
    check_names(query, values, bound)
    _set_variables(connection, query, values)
    bindings = {name: values[name] for name in bound}
    inside = look_into(pivots.sql)
    make_types(connection, pivots, values, look_into)
    if not unsafe:
        return Answer(connection, inside, bindings)
    answer = Answer(connection, statement, bindings)
    if list(statement.expected_result_type) == [duckdb.ExpectedResultType.QUERY_RESULT]:
        return answer
    answer.execute()
    return None


def _set_variables(connection: duckdb.DuckDBPyConnection, query: Query, values: Mapping[str, Value]) -> None:
    if query.variables:  # a value left by an earlier query on this connection does not apply to this one
        connection.execute("; ".join(f'reset variable "{name}"' for name in query.variables))
    for name in query.variables & values.keys():
        connection.execute(f'set variable "{name}" = $value', {"value": values[name]})


def single_statement(connection: duckdb.DuckDBPyConnection, query: Query) -> duckdb.Statement:
    """Return the one statement of a query's SQL. Raises UsageError for more or fewer."""
    statements = connection.extract_statements(query.sql)
    if len(statements) != 1:
        raise UsageError(f"{query.source} holds {len(statements)} SQL statements. Give exactly one.")
    return statements[0]


def bound_names(query: Query) -> AbstractSet[str] | None:
    """Return the names that a query binds as `$name`, which shipped ones never do; None if DuckDB cannot parse it."""
    import duckdb

    if query.shipped:
        return frozenset()
    try:
        statements = duckdb.extract_statements(query.sql)
    except duckdb.Error:
        return None
    return frozenset[str]().union(*(statement.named_parameters for statement in statements))


def check_names(query: Query, values: Mapping[str, Value], bound: AbstractSet[str]) -> None:
    """Raise UsageError for a value that the query does not use, or a name that it reads or binds without a value."""
    if positional := sorted(name for name in bound if not re.fullmatch(_NAME, name)):
        raise UsageError(f"{query.source} uses the parameter {positional[0]!r}. Give it a name, such as $layer.")
    known = query.variables | bound
    for name in values:
        if name not in known:
            wants = f"Its parameters: {', '.join(sorted(known))}." if known else _no_parameters(query.source)
            raise UsageError(f"{query.source} does not use the parameter {name!r}. {wants}")
    if missing := sorted((query.required | bound) - values.keys()):
        gives = " ".join(f"-p {name}=VALUE" for name in missing)
        names = f"parameter{'s'[: len(missing) != 1]} {', '.join(missing)}"
        raise UsageError(f"{query.source} needs the {names}. Add {gives}.")


def _no_parameters(source: str) -> str:
    view = source in view_names()
    return f'A view takes none: select its rows in SQL, "from {source} where …".' if view else "It takes no parameters."


def read_file(path: Path, *, shipped: bool = False) -> Query:
    """Return the query in a `.sql` file. Raises UsageError if it cannot be read."""
    try:
        return Query(path.name, path.read_text(encoding="utf-8-sig"), shipped)
    except FileNotFoundError as error:
        raise UsageError(f"there is no SQL file {path}.") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder. Name a file of SQL; `moewh check` runs those of a folder.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file in UTF-8.") from error
