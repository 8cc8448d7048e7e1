"""moewh: a SQL-queryable activation warehouse for Mixture-of-Experts language models.

Public names are loaded on first use, so `import moewh` costs nothing. `moewh.ingest` is both a package and a function:
calling the package ingests.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import moewh.ingest  # noqa: F401 - it becomes callable below
from moewh.warehouse import __version__
from moewh.warehouse.errors import MoewhError

if TYPE_CHECKING:
    from moewh import plots
    from moewh.api import Warehouse, ingest, open, record
    from moewh.ingest.recorder.trainer import TrainerCallback
    from moewh.ingest.recorder.writer import Writer

__all__ = ["MoewhError", "TrainerCallback", "Warehouse", "Writer", "__version__", "ingest", "open", "plots", "record"]

_HOMES = {
    "TrainerCallback": "moewh.ingest.recorder.trainer",
    "Writer": "moewh.ingest.recorder.writer",
    "Warehouse": "moewh.api",
    "open": "moewh.api",
    "record": "moewh.api",
}


class _CallablePackage(ModuleType):
    """The package `moewh.ingest`, which is also the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run prompts through a model and record its routing: see `moewh.api.ingest`."""
        from moewh.api import ingest

        return ingest(*arguments, **options)


sys.modules["moewh.ingest"].__class__ = _CallablePackage


def __dir__() -> list[str]:
    """Return the names of the module, also those not loaded yet, for completion in notebooks and shells."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name == "plots":
        return import_module("moewh.plots")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
