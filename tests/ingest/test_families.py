"""Every MoE family that the installed transformers ships, through the real ingest, against arithmetic done here.

What is stored must be what the model did: see `check_rows`. A family that transformers does not have yet is
skipped by name; one that it has and `tests.support.families` has not fails a test that says what to do.
"""

from __future__ import annotations

import pytest
import transformers

from moewh.ingest.families import adapters
from moewh.warehouse.errors import MoewhError
from tests.support.families import FAMILIES, WRAPPERS, Family, has_experts, present
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


@pytest.mark.parametrize("model_type", adapters.ADAPTERS)
def test_without_its_adapter_a_family_fails(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(family for family in FAMILIES if family.name == model_type.removesuffix("_text"))
    assert failure(family) is None
    monkeypatch.delitem(adapters.ADAPTERS, model_type)
    with pytest.raises((MoewhError, AssertionError)):
        check(family, observe(family))


def test_every_family_of_this_transformers_is_in_the_table() -> None:
    unknown = has_experts() - {family.name for family in FAMILIES}
    assert not unknown, (
        f"transformers {transformers.__version__} has experts in {', '.join(sorted(unknown))}, which no test covers. "
        "Add a row to FAMILIES in tests/support/families.py; if its test fails, it needs a file in ingest/families/."
    )
