"""Binding the arguments of a call of experts: as Python itself binds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moewh.ingest.families.rule import routed_call
from tests.support.models import tiny_model

HIDDEN, IDS, WEIGHTS = torch.zeros(2, 32), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
NAMED: dict[str, Any] = {"top_k_weights": WEIGHTS, "top_k_index": IDS, "hidden_states": HIDDEN}


@pytest.mark.parametrize("given", [3, 2, 1, 0])
def test_arguments_are_bound_in_the_order_of_the_forward(given: int) -> None:
    experts = tiny_model("olmoe").model.layers[0].mlp.experts
    parameters = routed_call(experts)
    assert parameters is not None
    args = (HIDDEN, IDS, WEIGHTS)[:given]
    kwargs = dict(list(NAMED.items())[: 3 - given])
    bound = parameters.bind(experts, args, kwargs)
    assert list(bound) == ["hidden_states", "top_k_index", "top_k_weights"]
    assert all(one is other for one, other in zip(bound.values(), (HIDDEN, IDS, WEIGHTS), strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((HIDDEN,), {}, "missing a required argument: 'top_k_index'"),
        ((HIDDEN, IDS, WEIGHTS, 1), {}, "too many positional arguments"),
        ((HIDDEN, IDS, WEIGHTS), {"scale": 1}, "unexpected keyword argument 'scale'"),
        ((HIDDEN, IDS), {"top_k_index": IDS, "top_k_weights": WEIGHTS}, "multiple values for argument 'top_k_index'"),
    ],
)
def test_a_call_that_the_forward_does_not_take_is_an_error(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    experts = tiny_model("olmoe").model.layers[0].mlp.experts
    parameters = routed_call(experts)
    assert parameters is not None
    with pytest.raises(TypeError, match=message):
        parameters.bind(experts, args, kwargs)
