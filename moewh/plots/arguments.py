"""The arguments of the functions that draw: checked, and in the types of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moewh.ingest.recorder.arguments import checked_text, whole
from moewh.warehouse.errors import UsageError, brief

if TYPE_CHECKING:
    from moewh.api import Warehouse
    from moewh.warehouse.answer.query import Value

_NUMBERS = ("layer", "expert")


def opened(warehouse: Any) -> Warehouse:
    """Return an opened warehouse.

    Raises UsageError for anything else, such as its path; MoewhError if it was deleted since it was opened.
    """
    from moewh.api import Warehouse

    if not isinstance(warehouse, Warehouse):
        raise UsageError(f"the warehouse is {brief(warehouse)}. Give an opened one: moewh.open(PATH).")
    warehouse.runs()
    return warehouse


def selection(at: Mapping[str, Any]) -> dict[str, Value | None]:
    """Return the values that select a drawing: whole numbers for a layer or expert, else texts or None.

    Raises UsageError for values of other types, such as a layer that is 1.5 or None.
    """
    return {
        name: whole(name, value) if name in _NUMBERS else checked_text(name.removesuffix("_id"), value)
        for name, value in at.items()
    }


def whole_ids(given: Any) -> list[int]:
    """Return one or several prompt_ids. Raises UsageError for anything but whole numbers."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    return [whole("prompt_id", one) for one in (given if several else [given])]
