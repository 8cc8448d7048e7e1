"""The family of a model: the file named after its model type, or the rule.

A family that differs has one file in this folder, which defines `FAMILY`, an adapter with everything particular to it.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from moewh.ingest.families.configuration import text_config
from moewh.ingest.families.rule import FamilyAdapter

_RULE = FamilyAdapter()


def family_of(config: Any) -> FamilyAdapter:
    """Return the adapter of a model's family, or the rule."""
    return adapter_of(text_config(config).model_type) or _RULE


def adapter_of(model_type: str) -> FamilyAdapter | None:
    """Return the adapter of the text configuration's model type; None for a family that follows the rule."""
    name = str(model_type).replace("-", "_")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name) or find_spec(f"{__package__}.{name}") is None:
        return None
    family: FamilyAdapter | None = getattr(import_module(f"{__package__}.{name}"), "FAMILY", None)
    return family
