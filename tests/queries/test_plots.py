"""`moewh.plots`: one function per figure, with its query's numbers; a figure that cannot be drawn is one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moewh
from moewh import plots
from moewh.api import Warehouse
from moewh.plots.drawing import label
from moewh.warehouse.errors import MoewhError, UsageError
from tests.support.hostile import HOSTILE
from tests.support.synthetic import empty_warehouse, random_run, random_warehouse, write_run

CALLS: dict[str, dict[str, Any]] = {
    "domains": {"domain": "code"},
    "specialization": {"domain": None},
    "repetition": {"domain": "prose"},
    "co_routing": {"layer": 3},
    "transitions": {"layer": 3},
    "top_tokens": {"layer": 3, "expert": 2},
    "geometry": {"run": "007"},
    "saliency": {"run": "mixed"},
}


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warehouse]:
    with moewh.open(random_warehouse(tmp_path_factory.mktemp("plots") / "wh")[0].root) as opened:
        yield opened


@pytest.mark.parametrize("name", plots.FIGURES)
def test_each_figure_is_a_plotly_figure_that_names_its_run(name: str, warehouse: Warehouse) -> None:
    """The newest run by default."""
    from plotly.graph_objects import Figure

    figure = getattr(plots, name)(warehouse, **CALLS.get(name, {}))
    assert isinstance(figure, Figure)
    run = CALLS.get(name, {}).get("run", "step-30")
    assert f"run {run}" in figure.layout.title.text
    assert len(figure.data) and getattr(plots, name).__doc__


def test_a_map_has_the_numbers_of_its_query(warehouse: Warehouse) -> None:
    for measure in ("lift", "conditional", "tokens"):
        figure = plots.co_routing(warehouse, layer=5, run="007", measure=measure)
        rows = warehouse.sql(f"select expert_a, expert_b, {measure} from co_routing where run_id = '007' and layer = 5")
        found = {(a, b): value for a, b, value in rows.fetchall()}
        z = figure.data[0].z
        assert {place: z[place] for place in found} == pytest.approx(found)
        assert np.isnan(np.diag(z)).all()
        assert np.nansum(z) == pytest.approx(sum(found.values()))


def test_curves_have_the_numbers_of_their_query(warehouse: Warehouse) -> None:
    figure = plots.saturation(warehouse, run="step-1")
    rows = warehouse.query("saturation_over_training").fetchall()
    shown = {
        (trace.name, step): share
        for trace in figure.data
        for step, share in zip(trace.x, trace.y, strict=True)
        if trace.name.startswith("layer")
    }
    assert shown == pytest.approx({(f"layer {row[2]}", row[3]): row[7] for row in rows})


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("load", {"run": "none"}, "there is no run 'none'"),
        ("co_routing", {"layer": 9}, "there is no MoE layer 9 in run step-30. MoE layers: 0, 3, 4."),
        ("domains", {"domain": "coda"}, "Did you mean 'code'"),
        ("top_tokens", {"layer": 3, "expert": 99}, "there is no expert 99"),
        ("load", {"measure": "none"}, "there is no measure 'none'. Known: share, tokens, mean_weight."),
        ("geometry", {}, "geometry_predicts_co_routing has no rows for run step-30. The run has no geometry"),
        ("saturation", {"run": "007"}, "The run is not a checkpoint of a series with a training step."),
        ("transitions", {"layer": 4}, "The last MoE layer has no next one."),
    ],
)
def test_what_cannot_be_drawn_is_reported(name: str, given: dict[str, Any], said: str, warehouse: Warehouse) -> None:
    with pytest.raises(MoewhError, match=re.escape(said)):
        getattr(plots, name)(warehouse, **given)


def test_a_checkpoint_without_a_step_has_no_place_on_the_axis(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    last = replace(random_run("last", 1, {0: (6, 2)}), fields={"series": "s", "tokens_key": "t", "train_step": 9})
    write_run(layout, last)
    write_run(layout, replace(last, run_id="unknown", fields={**last.fields, "train_step": None}))
    with moewh.open(layout.root) as opened_warehouse:
        figure = plots.saturation(opened_warehouse, run="last")
        assert [list(trace.x) for trace in figure.data] == [[9], [9, 9]]
        with pytest.raises(MoewhError, match="not a checkpoint of a series with a training step"):
            plots.saturation(opened_warehouse, run="unknown")


def test_no_runs_and_no_plotly_are_reported(
    warehouse: Warehouse, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = moewh.open(empty_warehouse(tmp_path_factory.mktemp("empty") / "wh").root)
    with pytest.raises(MoewhError, match="the warehouse has no runs"):
        plots.load(empty)
    empty.close()
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(UsageError, match=r"pip install 'moewh\[report\]'"):
        plots.load(warehouse)


def test_an_unknown_figure_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'none'"):
        plots.none  # noqa: B018
    assert {"load", "tokens"} <= set(dir(plots))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_label_has_no_markup(text: str) -> None:
    """Plotly interprets `<…>` as tags and `&…;` as characters."""
    shown = label(text)
    assert "<" not in shown and ">" not in shown
    assert shown.replace("&lt;", "").replace("&gt;", "").replace("&amp;", "").count("&") == 0
    assert shown.isprintable() or set(shown) & {"\u200c", "\u200d"}
