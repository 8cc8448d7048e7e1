"""The views whose SQL lies in `queries/`: the canned ones, and the staging views between these and the stored tables.

Several canned views, saved queries, rollups and checks share a staging view. Staging views are created like the others
but listed nowhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moewh.warehouse.files import schema

QUERIES = Path(__file__).resolve().parent.parent.parent / "queries"


@dataclass(frozen=True)
class View:
    """One view: its name, the statement that creates it and its COMMENT statements."""

    name: str
    create: str
    comments: tuple[str, ...]
    header: str
    """The leading comment of the view's file; for a stored table, its description."""

    @property
    def code(self) -> str:
        """The statement that creates the view, without its comment lines."""
        return re.sub(r"(?m)^\s*--.*$", "", self.create)


def view_names() -> tuple[str, ...]:
    """Return the names of all views: the stored tables first, then the canned ones in alphabetical order."""
    return (*(table.name for table in schema.TABLES), *canned_names())


def canned_names() -> tuple[str, ...]:
    """Return the names of the canned views: the stems of the files in `queries/views/`."""
    return tuple(sorted(path.stem for path in (QUERIES / "views").glob("*.sql")))


@cache
def canned_views() -> tuple[View, ...]:
    """Return the canned views, in alphabetical order."""
    return tuple(_read_view(QUERIES / "views" / f"{name}.sql") for name in canned_names())


@cache
def staging_views() -> tuple[View, ...]:
    """Return the staging views, in alphabetical order."""
    return tuple(_read_view(path) for path in sorted((QUERIES / "staging").glob("*.sql")))


def staging_query(name: str) -> str:
    """Return the query of a staging view."""
    (code,) = (view.code for view in staging_views() if view.name == name)
    return code.partition(" as\n")[2].strip()


@cache
def derived_views() -> tuple[View, ...]:
    """Return the staging and the canned views, each after those it reads."""
    from graphlib import TopologicalSorter

    views = {view.name: view for view in (*staging_views(), *canned_views())}
    reads = {
        view.name: [name for name in views if view.name != name and _reads(view.code, name)] for view in views.values()
    }
    return tuple(views[name] for name in TopologicalSorter(reads).static_order())


def staging_read_by(sql: str) -> tuple[View, ...]:
    """Return the staging views that SQL without comments reads, directly or through others, in order of reading."""
    found: list[View] = []
    for view in reversed(derived_views()):
        if view in staging_views() and any(_reads(code, view.name) for code in (sql, *(other.code for other in found))):
            found.insert(0, view)
    return tuple(found)


def _reads(code: str, name: str) -> bool:
    """Return whether SQL names a view that is not shadowed by a CTE."""
    return name in code and re.search(rf"\b{name}\b(?!\s+as\s*\()", code) is not None


def _read_view(path: Path) -> View:
    """Split a view's file into its header, the statement that creates it, and its COMMENT statements."""
    text = path.read_text(encoding="utf-8")
    create, *comments = (statement for statement in text.split(";\n") if statement.strip())
    header = "\n".join(line.removeprefix("--").strip() for line in text.splitlines() if line.startswith("--"))
    return View(path.stem, create, tuple(comments), header)
