"""docs/pruning.md agrees with `benchmarks.pruning`: its table, its SQL, and the pruned model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import silu

from benchmarks.pruning import DROP, HEADER, RANKS, without_experts
from moewh.warehouse.views.opening import open_warehouse
from tests.support.models import tiny_model
from tests.support.synthetic import random_warehouse

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "pruning.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_script() -> None:
    table = PAGE.partition(HEADER)[2].splitlines()[2:]
    names = [line.split(" | ")[0].removeprefix("| ") for line in table[: len(RANKS) + 2]]
    assert names == ["none: the whole model", *RANKS, names[-1]]
    assert re.fullmatch(r"nothing: at random, \d+ seeds", names[-1])


def test_its_sql_names_the_experts_that_the_script_drops(tmp_path: Path) -> None:
    layout, runs = random_warehouse(tmp_path / "wh")
    (run,) = (run for run in runs if run.run_id == "mixed")
    look, drop = (sql.replace("'calibration'", "'mixed'") for sql in re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL))
    with open_warehouse(layout) as connection:
        shown, dropped = connection.execute(look).fetchall(), connection.execute(drop).fetchall()
        one_each = connection.execute(DROP.format(run="mixed", rank="mean_weighted_norm_rank", dropped=1)).fetchall()
    least = {
        layer: [expert for number, expert, *_ in shown if number == layer][: experts // 4]
        for layer, (experts, _) in run.layers.items()
    }
    assert sorted(dropped) == sorted((layer, expert) for layer, some in least.items() for expert in some)
    assert len(dropped) == 4
    assert one_each == [(layer, some[0]) for layer, some in sorted(least.items())]


@torch.no_grad()
def test_what_is_left_routes_among_the_other_experts() -> None:
    model: Any = tiny_model("olmoe")
    gone = {0: [1, 6], 1: [0, 7], 2: [2, 3]}
    smaller = without_experts(model, gone)
    assert smaller.config.num_experts == 6
    for layer, experts in gone.items():
        block = model.model.layers[layer].mlp
        x_TH = torch.randn(5, 32)
        logits_TE = x_TH @ block.gate.weight.T
        logits_TE[:, experts] = -torch.inf
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(3)
        expected_TH = torch.zeros_like(x_TH)
        for token, (weights, ids) in enumerate(zip(weights_TK, ids_TK.tolist(), strict=True)):
            for weight, expert in zip(weights, ids, strict=True):
                gate_I, up_I = (block.experts.gate_up_proj[expert] @ x_TH[token]).chunk(2)
                expected_TH[token] += weight * (block.experts.down_proj[expert] @ (silu(gate_I) * up_I))
        put_out = smaller.model.layers[layer].mlp(x_TH[None])
        assert torch.allclose(put_out[0] if put_out.dim() == 3 else put_out, expected_TH, rtol=1e-4, atol=1e-6)
