"""`warehouse.duckdb` as copies of one file: building its views and comments takes a third of a small ingest.

The views in the copies read a warehouse that no longer exists. So a test that reads the file fails, unless its module
is marked `published_file`: there, each file is built as for users.
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
    """Make `publish` put a copy in place, with its usual locks and renames.

    The file of a published warehouse is still built: its views list the published files.
    """

    def copy(warehouse: Readable, file: Path) -> None:
        if isinstance(warehouse, Layout):
            shutil.copyfile(made(), file)
        else:
            _BUILD(warehouse, file)

    patch.setattr(publishing, "build", copy)


def publish_for_reading(layout: Layout) -> None:
    """Build the file as for users, in a module without the mark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "build", _BUILD)
        publishing.publish(layout)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def made() -> Path:
    """Return a file with every view and comment, built once per session."""
    file = Path(_scratch().name) / "warehouse.duckdb"
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder) / "wh")
        layout.create()
        _BUILD(layout, file)
    return file
