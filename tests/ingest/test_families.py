"""Every MoE family that the installed transformers ships, through the real ingest, against arithmetic done here.

The stored rows must match the model's computation: see `check_rows`. A family that transformers does not have yet is
skipped by name; one missing from `tests.support.families` fails a test that explains what to do.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from moewh.ingest.families import find
from moewh.ingest.families.rule import FamilyAdapter, MoELayer
from moewh.ingest.geometry.matrices import layer_weights
from moewh.ingest.model.layers import find_moe_layers
from moewh.warehouse.errors import MoewhError
from tests.support.families import FAMILIES, WRAPPERS, Family, adapters, build, has_experts, present
from tests.support.observed_families import check, failure, observe, observed


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS], ids=lambda family: family.name)
def test_family(family: Family) -> None:
    if not present(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family.name}")
    if family.refused:
        with pytest.raises(MoewhError, match=family.refused):
            observed(family)
        return
    if (error := failure(family)) is not None:
        raise error


ADAPTERS = adapters()
READING = [
    name
    for name, it in ADAPTERS.items()
    if type(it).attach != FamilyAdapter.attach or type(it).rows != FamilyAdapter.rows
]
"""Families whose calls are not read by the rule."""


def of_file(name: str) -> Family:
    """Return the family whose file has this name; skip the test if transformers does not have it."""
    family = next(family for family in FAMILIES if family.name == name.removesuffix("_text"))
    if not present(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family.name}")
    return family


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, act as if a family had no file."""
    monkeypatch.setattr(f"moewh.ingest.families.{name}.FAMILY", None)


@pytest.mark.parametrize("name", READING)
def test_without_its_adapter_a_family_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = of_file(name)
    assert failure(family) is None
    without(name, monkeypatch)
    with pytest.raises((MoewhError, AssertionError)):
        check(family, observe(family))


def said(family: Family) -> list[Any]:
    """Return moewh's description of a family without running it, layer by layer; or why it refuses it."""
    model = build(family)
    try:
        moe_layers = find_moe_layers(model, model.config).moe_layers
        return [
            (moe.path, moe.kinds, moe.family.declared(moe, model.config), moe.family.measurable, weights(moe))
            for moe in moe_layers
        ]
    except MoewhError as refusal:
        return [str(refusal)]


def weights(moe: MoELayer) -> list[tuple[int, ...]] | str:
    """Return the shapes of a layer's matrices; or why `moewh geometry` refuses it."""
    try:
        return [tuple(matrix.shape) for matrix in layer_weights(moe).down]
    except MoewhError as refusal:
        return str(refusal)


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - set(READING)))
def test_every_family_file_matters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the file, the family's description changes, and `test_family` and the geometry's tests find it wrong."""
    family = of_file(name)
    shipped = said(family)
    without(name, monkeypatch)
    assert said(family) != shipped


@pytest.mark.parametrize("model_type", ["rule", "find", "__init__", "../run", "os", "a.b", "", "mixtral"])
def test_a_model_type_finds_no_other_file(model_type: str) -> None:
    assert find.adapter_of(model_type) is None


def test_an_adapter_says_why_the_family_differs() -> None:
    for adapter in ADAPTERS.values():
        assert (type(adapter).__doc__ or "").splitlines()[0].endswith((".", ":"))


def test_every_family_of_this_transformers_is_in_the_table() -> None:
    unknown = has_experts() - {family.name for family in FAMILIES}
    assert not unknown, (
        f"transformers {transformers.__version__} has experts in {', '.join(sorted(unknown))}, which no test covers. "
        "Add a row to FAMILIES in tests/support/families.py; if its test fails, it needs a file in ingest/families/."
    )
