"""SQL that reads the files of a warehouse: literals, paths below its root, rows of files, and runs that have one."""

from __future__ import annotations

from moewh.warehouse.errors import require_utf8
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import ANY_RUN, ANY_SEGMENT, FOLDERS, PATH_VALUES, RUN_FOLDER, SCHEMA_RUN, STRAYS


def sql_string(text: str) -> str:
    """Return text as an SQL string literal. Raises UsageError for a path that is not UTF-8: DuckDB takes no other."""
    require_utf8(text)
    return "'" + text.replace("'", "''") + "'"


def below(root: str, path: str) -> str:
    """Return SQL for a path or pattern below the root, wherever the warehouse is now."""
    return f"coalesce(getvariable('moewh_root'), {root}) || '/{path}'"


def zero_rows_first(root: str, path: str) -> str:
    """Return SQL for a list of the zero-row file that a pattern below the root matches, and the pattern.

    DuckDB estimates a table's size from its first file, and takes this one for empty when it plans a join.
    """
    return f"[{below(root, _of_zero_rows(path))}, {below(root, path)}]"


def _of_zero_rows(folders: str) -> str:
    """Return those of the folders that a pattern matches which hold the zero-row files."""
    return folders.replace(ANY_RUN, f"{RUN_FOLDER}{SCHEMA_RUN}")


def rows_of_table(table: schema.Table, layout: Layout, root: str, folders: str | None = None) -> str:
    """Return a subquery over every file of a table; without rows for a warehouse that is older than the table.

    `folders` is a pattern of folders to use instead of those of the table's level. A folder that is not a run's or a
    segment's, such as a copy called `segment=0.old`, is left out; `moewh verify` reports it.
    """
    if table.may_lack_files and not layout.has_table(table):
        return no_rows(table)
    folders = folders or FOLDERS[table.level]
    path = f"{folders}/{table.file}"
    return rows_of_files(table, below(root, path), folders, f" where {no_stray(root, path)}")


def rows_of_files(table: schema.Table, files: str, folders: str, where: str = "") -> str:
    """Return a subquery over the rows of `files`, SQL for a pattern or a list of paths: the columns of the path first.

    They are read from the end of the path, which `folders` describes, so that folders above the root do not matter:
    DuckDB's own partitioning would use every `name=value` of the whole path and hide columns of the file. They are
    constant within a file, so a filter on them skips files before they are opened.
    """
    patterns = {"run_id": ANY_RUN, "segment": ANY_SEGMENT}
    values = [
        f"substr({_folder(folders, patterns[column.name])}, {len(column.name) + 2})::{column.type} as {column.name}"
        for column in table.path_columns
    ]
    columns = ", ".join([*values, *(column.name for column in table.stored)])
    return f"(select {columns} from {with_filename(table, files)}{where})"


def with_filename(table: schema.Table, files: str) -> str:
    """Return the call that reads the stored columns of `files`, SQL for a pattern or a list, and `filename`."""
    return f"read_parquet({files}, hive_partitioning = false, filename = true{_given_schema(table)})"


def _given_schema(table: schema.Table) -> str:
    """Return the option that fills columns missing from older files with NULL; empty for a table without such columns.

    `union_by_name` would do the same, but reads the footer of every file before a filter can skip it.
    """
    if not table.newer:
        return ""
    columns = ", ".join(
        f"{sql_string(column.name)}: {{name: {sql_string(column.name)}, type: '{column.type}', default_value: null}}"
        for column in table.stored
    )
    return f", schema = map {{{columns}}}"


def no_rows(table: schema.Table) -> str:
    """Return a subquery with the columns of a table and no rows."""
    nothing = ", ".join(f"null::{column.type} as {column.name}" for column in (*table.path_columns, *table.stored))
    return f"(select {nothing} where false)"


def no_stray(root: str, path: str) -> str:
    """Return SQL for whether no folder of `filename`, which matches `path` below the root, is a stray.

    DuckDB evaluates this for each of thousands of files before it opens one, and each function takes time: patterns of
    the whole of `filename` need no other. They leave its start open, because DuckDB may spell it differently, as for
    `~` or a double slash. Where the warehouse itself lies in a folder of a run, its folders are compared one by one.
    """
    above = f"{below(root, '')} glob '*/{path.partition('/')[0]}/run_id=*/*'"
    return f"case when {above} then {_are_legal(path, one_by_one=True)} else {_are_legal(path)} end"


def _are_legal(path: str, *, one_by_one: bool = False) -> str:
    """Return SQL for whether the names of all folders of `filename` are legal: `no_stray` in one of its two ways."""
    tests = []
    for pattern, name in ((each, name) for each, names in STRAYS.items() if each in path for name in names):
        text, stray, schema_run = "filename", f"*/{path.replace(pattern, name)}", f"*/{_of_zero_rows(path)}"
        if one_by_one:
            text, stray, schema_run = _folder(path.rpartition("/")[0], pattern), name, _of_zero_rows(pattern)
        test = f"not {text} glob '{stray}'"
        tests.append(f"({test} or {text} glob '{schema_run}')" if pattern == ANY_RUN else test)
    return " and ".join(tests)


def _folder(folders: str, pattern: str) -> str:
    """Return SQL for the name of the folder of `filename` that one of the patterns in `folders` matches."""
    depth = folders.split("/")[::-1].index(pattern) + 2
    return f"string_split(filename, '/')[-{depth}]"


def runs_of(root: str, pattern: str, between: str = "") -> str:
    """Return SQL for the runs that have a file matching `pattern` below the root, and its path.

    `between` is the path between the run's folder and the file.
    """
    end = f"'/run_id=({PATH_VALUES['run_id']})/{between}[^/]*$'"
    files = f"glob({below(root, pattern)})"
    return f"select regexp_extract(file, {end}, 1) as run_id, file from {files} where regexp_matches(file, {end})"


def column_names(table: schema.Table) -> list[str]:
    """Return the names of a table's columns, those of the path first."""
    return [column.name for column in table.viewed]
