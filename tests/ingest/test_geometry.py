"""A layer's geometry, compared with numpy on the model's own float32 weights, for every family in transformers."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moewh.ingest.geometry.matrices import LayerWeights, layer_weights
from moewh.ingest.geometry.subspaces import layer_geometry
from moewh.warehouse.errors import MoewhError
from tests.support.families import FAMILIES, Family, build, present
from tests.support.family_geometries import WITHOUT_ROWS, assert_rows, expected, open_checkpoint, path_of, same
from tests.support.geometries import Row
from tests.support.models import save_model

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "geometry.md"
RANK = 3
REFUSED = {"doge": "layout that `moewh geometry` does not know", "nllb_moe": "transformers computes it wrongly"}
"""Families without a geometry, and the message."""
OTHER_SPACE = {"muse_spark", "nemotron_h"}
"""Families whose experts' input is a projection of the router's."""


def as_rows(columns: dict[str, Any]) -> list[Row]:
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*(c.tolist() for c in columns.values()), strict=True)
    ]


# ------------------------------------------------------------------------------------------ every family


@dataclass(frozen=True)
class Saved:
    """A family's model, and the folder in which it is saved."""

    family: Family
    model: Any
    folder: Path


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family: Family = request.param
    if not present(family):
        pytest.skip(f"transformers has no {family.model}")
    model = build(family)
    model.save_pretrained(folder := tmp_path_factory.mktemp(family.name))
    return Saved(family, model, folder)


def test_family_equals_numpy(saved: Saved) -> None:
    """From the files that transformers saves (the hub's layout, mostly) to the numbers of the model it saved."""
    family, model = saved.family, saved.model
    if family.name in REFUSED:
        with pytest.raises(MoewhError, match=REFUSED[family.name]):
            for moe in open_checkpoint(saved.folder).moe_layers:
                layer_weights(moe)
        return
    checkpoint = open_checkpoint(saved.folder)
    assert len(checkpoint.moe_layers) >= 2
    for moe in checkpoint.moe_layers:
        router = path_of(checkpoint, moe.router)
        with checkpoint.layer(moe):
            weights = layer_weights(moe)
            found = layer_geometry(weights, moe.layer, moe.num_experts, RANK, torch.device("cpu"))
        assert all(parameter.is_meta for parameter in checkpoint.model.parameters())
        of_experts, of_router, of_pairs = expected(family, model, moe, router, RANK)
        mlp = moe.kinds.count("mlp")
        assert_rows(as_rows(found.experts), of_experts, beyond=mlp)
        assert_rows(as_rows(found.router_pairs), of_router)
        assert_rows(as_rows(found.expert_pairs), of_pairs, beyond=mlp)
        defined = of_experts[0]["input_share"] is not None
        assert defined == (family.name not in WITHOUT_ROWS | OTHER_SPACE)


NOT_LINEAR = {
    **{"gemma4": "a norm first", "diffusion_gemma": "a norm first", "zaya": "an MLP", "jetmoe": "takes no zeros"},
    **{"muse_spark": "scaled", "laguna": "soft cap", "deepseek_v4": "its first layers choose by token id"},
}
"""Routers whose logits are not just the products of their input with the rows."""


@torch.no_grad()
def test_router_rows_are_what_logits_are_products_with(saved: Saved) -> None:
    """Row i belongs to expert i: the router's own forward, given unit vectors, returns the rows."""
    if saved.family.name in NOT_LINEAR.keys() | REFUSED.keys():
        pytest.skip("its logits are something else")
    checkpoint = open_checkpoint(saved.folder)
    moe = checkpoint.moe_layers[-1]
    router = saved.model.get_submodule(path_of(checkpoint, moe.router))
    with checkpoint.layer(moe):
        rows_EH = layer_weights(moe).router_EH
    assert rows_EH is not None
    H = rows_EH.shape[1]
    units = torch.cat([torch.eye(H), torch.zeros(1, H)])[None]
    takes = [name for name in inspect.signature(router.forward).parameters if name.endswith("bias")]
    logits = moe.family.logits(router(units, *(torch.zeros(len(rows_EH)) for _ in takes))).reshape(H + 1, -1)
    if not logits.is_floating_point():
        pytest.skip("this version of transformers puts out its choice first")
    assert torch.allclose((logits[:-1] - logits[-1]).T, rows_EH, atol=1e-6)


# ------------------------------------------------------------------------------------------ what is not defined


def alike_layer(down: torch.Tensor) -> LayerWeights:
    """Two experts with the same `up` [4, 6] and `down` [6, 4], without a gate or a router."""
    up = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    return LayerWeights(None, [up, up], [down, down], None)


def test_what_is_not_defined_is_nan() -> None:
    """Zeros have no spectrum; a matrix of rank 1 has one, and no subspace of two dimensions; there is no router."""
    one_dimension = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0))
    for down, rank_of_down in ((torch.zeros(6, 4), math.nan), (one_dimension, 1.0)):
        found = layer_geometry(alike_layer(down), 0, 3, 2, torch.device("cpu"))
        first, _, identity = as_rows(found.experts)
        names = ("router_norm", "gate_norm", "input_share", "output_share")
        assert all(math.isnan(first[name]) for name in names)
        assert first["output_effective_rank"] == pytest.approx(rank_of_down, rel=1e-6, nan_ok=True)
        assert 3 < first["input_effective_rank"] < 4
        defined = {name for name, value in identity.items() if not math.isnan(value)}
        assert defined == {"layer", "expert", "subspace_rank", "random_share"}
        pair = as_rows(found.expert_pairs)[0]
        assert same(pair["input_cosine"], 1.0)
        assert same(pair["input_overlap"], 1.0)
        assert math.isnan(pair["output_overlap"])
        assert len(as_rows(found.router_pairs)) == len(as_rows(found.expert_pairs)) == 3


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = alike_layer(torch.ones(6, 4))
    weights.down[1][2, 3] = math.nan
    with pytest.raises(MoewhError, match="layer 7: the weights of expert 0 are not all finite"):
        layer_geometry(weights, 7, 2, 2, torch.device("cpu"))


def test_unknown_layout_is_refused(tmp_path: Path) -> None:
    """One more matrix, or shapes that fit no layout: refused by name, never guessed."""
    save_model(tmp_path)
    moe = open_checkpoint(tmp_path).moe_layers[0]
    layer_weights(moe)
    moe.experts.adapter = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(MoewhError, match=r"model.layers.0.mlp.experts \(OlmoeExperts\) .* adapter 2 x 2"):
        layer_weights(moe)
    del moe.experts.adapter
    moe.experts.down_proj = torch.nn.Parameter(torch.zeros(8, 32, 47))
    with pytest.raises(MoewhError, match=r"gate_up_proj 8 x 96 x 32, down_proj 8 x 32 x 47"):
        layer_weights(moe)


def test_page_names_the_families() -> None:
    page = PAGE.read_text()
    assert f"{len(FAMILIES) - len(REFUSED)} of {len(FAMILIES)} families have a geometry" in page
    (refused,) = (line for line in page.splitlines() if line.startswith("- Refused: "))
    assert set(re.findall(r"`(\w+)`", refused.partition("refused by")[0])) == REFUSED.keys()
    assert all(f"`{name}`" in page for name in WITHOUT_ROWS | OTHER_SPACE)
