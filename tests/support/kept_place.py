"""A warehouse put back as it was made, at the same path: its published file names that path, and takes long to make."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.publishing import publish


class Kept:
    """A published warehouse, for tests that change it one after another."""

    def __init__(self, folder: Path, make: Callable[[Path], Layout]) -> None:
        """Make it in `folder / "at"`, which tests may use, and publish it."""
        self.layout, self._copy = Layout(folder / "at" / "wh"), folder / "kept"
        publish(make(self.layout.root))
        shutil.copytree(self.layout.root, self._copy, symlinks=True)

    def again(self) -> Layout:
        """Return it as it was made, with nothing beside it."""
        shutil.rmtree(self.layout.root.parent)
        shutil.copytree(self._copy, self.layout.root, symlinks=True)
        return self.layout
