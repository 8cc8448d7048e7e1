"""`warehouse.duckdb` without the work: making its views and their comments takes a third of a small ingest.

Whatever publishes then puts a copy of one file in place, whose views read a warehouse that is gone. So a test that
reads the file fails, unless its module is marked `published_file`: there each file is made as users have it.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.remote.published import Readable
from moewh.warehouse.views import publishing

_BUILD = publishing.build


def copy_one_file(patch: pytest.MonkeyPatch) -> None:
    """Have `publish` write what it always does, under its locks and with its renames, but with a copy's bytes.

    The file of a published warehouse is made: `moewh publish` may be loaded meanwhile.
    """

    def copy(warehouse: Readable, file: Path) -> None:
        if isinstance(warehouse, Layout):
            shutil.copyfile(made(), file)
        else:
            _BUILD(warehouse, file)

    patch.setattr(publishing, "build", copy)


def publish_for_reading(layout: Layout) -> None:
    """Write the file as users have it, in a module that is not marked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "build", _BUILD)
        publishing.publish(layout)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def made() -> Path:
    """Return a file with every view and comment, made once a session."""
    file = Path(_scratch().name) / "warehouse.duckdb"
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder) / "wh")
        layout.create()
        _BUILD(layout, file)
    return file
