"""A warehouse restored before each test, at the same path: `warehouse.duckdb` names the path and is slow to build."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.publishing import publish


class RestoredWarehouse:
    """A warehouse with its `warehouse.duckdb`, for tests that change it one after another."""

    def __init__(self, folder: Path, make: Callable[[Path], Layout]) -> None:
        """Build it at `folder / "at" / "wh"` with `make`; tests may also use `folder / "at"`."""
        self.layout, self._copy = Layout(folder / "at" / "wh"), folder / "original"
        publish(make(self.layout.root))
        shutil.copytree(self.layout.root, self._copy, symlinks=True)

    def restore(self) -> Layout:
        """Return the warehouse as it was built, and remove everything beside it."""
        shutil.rmtree(self.layout.root.parent)
        shutil.copytree(self._copy, self.layout.root, symlinks=True)
        return self.layout
