"""A family's geometry as numpy computes it from the loaded model, and its checkpoint as `moewh geometry` opens it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moewh.ingest.families.rule import MoELayer
from moewh.ingest.geometry.checkpoint import Checkpoint
from moewh.ingest.model.architecture import read_config
from moewh.ingest.model.loading import find_source
from tests.support.families import FAMILIES, Family
from tests.support.geometries import Expert, Matrix, Row, direct_expert_pairs, direct_experts, direct_router_pairs

WITHOUT_ROWS = {"zaya"}
"""Families whose router is no matrix with a row for each expert."""


def numbers(tensor: torch.Tensor) -> Matrix:
    return tensor.detach().double().numpy()


def fused(experts: Any, place: int) -> Expert:
    """Gate above up, (out, in)."""
    gate, up = np.split(numbers(experts.gate_up_proj[place]), 2)
    return Expert(gate, up, numbers(experts.down_proj[place]))


def transposed(experts: Any, place: int) -> Expert:
    """The same stored as (in, out)."""
    gate, up = np.split(numbers(experts.gate_up_proj[place]).T, 2)
    return Expert(gate, up, numbers(experts.down_proj[place]).T)


def in_turns(experts: Any, place: int) -> Expert:
    """Stored as (in, out), gate and up in turns."""
    both = numbers(experts.gate_up_proj[place]).T
    return Expert(both[0::2], both[1::2], numbers(experts.down_proj[place]).T)


def ungated(experts: Any, place: int) -> Expert:
    return Expert(None, numbers(experts.up_proj[place]), numbers(experts.down_proj[place]))


def rows_of_one_matrix(experts: Any, place: int) -> Expert:
    """DBRX: all experts' neurons below each other."""
    size = experts.ffn_hidden_size
    gate, up, down = (numbers(getattr(experts.mlp, name))[place * size :][:size] for name in ("w1", "v1", "w2"))
    return Expert(gate, up, down.T)


def modules(experts: Any, place: int) -> Expert:
    """Switch: a module each."""
    module = experts[f"expert_{place}"]
    return Expert(None, numbers(module.wi.weight), numbers(module.wo.weight))


def jetmoe(block: Any, place: int) -> Expert:
    gate, up = np.split(numbers(block.input_linear.weight[place]), 2)
    return Expert(gate, up, numbers(block.output_linear.weight[place]))


MATRICES = {
    "swiglu_transposed": transposed,
    "swiglu_concatenated": transposed,
    "swiglu_interleaved": in_turns,
    "ungated": ungated,
    "dbrx": rows_of_one_matrix,
    "dense": modules,
    "jetmoe": jetmoe,
}
"""By `Family.arithmetic`, which the families' tests hold against the models' forward passes; the others are `fused`."""


def expected(family: Family, model: Any, moe: MoELayer, router: str | None, rank: int) -> list[list[Row]]:
    """What the three tables must hold of a layer, by numpy on the loaded `model`; `moe` tells the modules' paths."""
    kind = MATRICES.get(family.arithmetic, fused)
    experts = [kind(model.get_submodule(moe.path), place) for place in range(moe.kinds.count("mlp"))]
    router_EH = None
    if router is not None and family.name not in WITHOUT_ROWS:
        stored = model.get_submodule(router).named_parameters()
        matrices = [matrix for name, matrix in stored if matrix.dim() == 2 and not name.endswith("bias")]
        assert len(matrices) == 1
        router_EH = numbers(matrices[0])[: moe.num_experts]
    return [
        direct_experts(experts, router_EH, rank),
        direct_router_pairs(router_EH, moe.num_experts),
        direct_expert_pairs(experts, rank),
    ]


def assert_rows(got: list[Row], wanted: list[Row], *, beyond: int = 0) -> None:
    """The rows of a layer, `layer` aside, to 1e-9; the experts from `beyond` on have no weights."""
    kept = [row for row in got if not beyond or max(row.get("expert", 0), row.get("expert_b", 0)) < beyond]
    assert len(kept) == len(wanted)
    for row, target in zip(kept, wanted, strict=True):
        assert set(row) - {"layer", "run_id"} == set(target)
        for name, value in target.items():
            assert same(row[name], value), (name, row[name], value)


def same(value: Any, target: Any) -> bool:
    undefined = value is None or (isinstance(value, float) and math.isnan(value))
    return undefined if target is None else not undefined and math.isclose(value, target, rel_tol=1e-9, abs_tol=1e-12)


def path_of(checkpoint: Checkpoint, module: Any) -> str | None:
    return next((path for path, found in checkpoint.model.named_modules() if found is module), None)


def open_checkpoint(folder: Path) -> Checkpoint:
    source = find_source(str(folder), None)
    return Checkpoint(source, read_config(source.location), None)


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
