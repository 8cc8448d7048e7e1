"""Empty warehouses as copies of one: most tests begin with one, and building it takes a tenth of a small ingest.

In an empty folder, `Layout.create` writes the files of a warehouse that was built earlier, byte by byte. In any other
folder, and in tests that change the schema, it works as usual.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout

_CREATE = Layout.create
_BEFORE = (".", ".staging")
"""Folders that may exist already: an ingest spools its prompts first."""


def copy_one_empty_warehouse(patch: pytest.MonkeyPatch) -> None:
    """Make `Layout.create` copy one empty warehouse."""
    patch.setattr(Layout, "create", _create)


def _create(layout: Layout) -> None:
    made = _made()
    layout._require_folder()
    if _schema() != _OURS or any(os.path.lexists(layout.root / path) for path in made if path not in _BEFORE):
        _CREATE(layout)
        return
    with layout.writing():
        for path, content in made.items():
            if content is None:
                (layout.root / path).mkdir(parents=True, exist_ok=path in _BEFORE)
            else:
                (layout.root / path).write_bytes(content)


def _schema() -> tuple[object, ...]:
    return (schema.FORMAT_VERSION, schema.SCHEMA_VERSION, id(schema.TABLES), id(schema.SEALED))


_OURS = _schema()


@functools.cache
def _made() -> dict[str, bytes | None]:
    """Return the folders (None) and files (bytes) of an empty warehouse by path, each after its parent."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _CREATE(Layout(root))
        paths = [root, *sorted(root.rglob("*"))]
        return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in paths}
