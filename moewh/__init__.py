"""moewh: a SQL-queryable activation warehouse for Mixture-of-Experts language models.

The public names are loaded when they are first used: `import moewh` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moewh.warehouse import __version__

if TYPE_CHECKING:
    from moewh.api import Warehouse, open

__all__ = ["Warehouse", "__version__", "open"]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name in __all__:
        from moewh import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
