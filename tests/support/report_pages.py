"""What a report's page holds, taken out of its HTML by other means than the page's own."""

from __future__ import annotations

import base64
import json
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.warehouse.answer.query import Query, find_query, parse_parameters
from moewh.warehouse.files.layout import Layout
from tests.support.opened import engine_of

Row = dict[str, Any]
MAPS = {
    "load": ("layer", "expert"),
    "domains": ("layer", "expert"),
    "co_routing": ("expert_a", "expert_b"),
    "transitions": ("expert", "next_expert"),
    "saliency": ("layer", "expert"),
}
"""Heat map → the columns of its query along y and x."""
COMPUTED = {"chance"}
"""What a figure shows beside its query's columns."""


def write_report(layout: Layout, output: Path, *options: str) -> str:
    """Write a report with the command, in this process, and return the page."""
    arguments = ["report", "--warehouse", str(layout.root), "-o", str(output), *options]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return output.read_text(encoding="utf-8")


def contents_of(page: str) -> dict[str, Any]:
    """The data of a page."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def panel_of(contents: dict[str, Any], name: str) -> dict[str, Any]:
    """One figure of a page's data."""
    (found,) = (panel for panel in contents["panels"] if panel["name"] == name)
    return dict(found)


def decoded(spec: dict[str, str]) -> npt.NDArray[np.float64]:
    """A typed array as Plotly writes it."""
    flat = np.frombuffer(base64.b64decode(spec["bdata"]), f"<{spec['dtype']}").astype(np.float64)
    return flat.reshape([int(side) for side in spec["shape"].split(",")]) if "shape" in spec else flat


def asked(layout: Layout, command: str) -> list[Row]:
    """The rows of a command that a page names, which is parsed as a shell does."""
    return list(_asked(layout, command))


@lru_cache(maxsize=256)
def _asked(layout: Layout, command: str) -> list[Row]:
    _, verb, *words = shlex.split(command)
    assert verb == "query"
    if words[0] == "-c":
        found, values = Query("-c", words[1]), {}
    else:
        assert words[1::2] == ["-p"] * (len(words) // 2)
        found, values = find_query(words[0]), parse_parameters(tuple(words[2::2]))
    answer = engine_of(layout)(found, dict(values))
    assert answer is not None
    cursor = answer.execute()
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def close(shown: Any, real: Any) -> bool:
    """Tell whether a number of a page is a query's, to 32 bits; nothing is NULL."""
    if real is None or shown is None or np.isnan(shown):
        return real is None and (shown is None or bool(np.isnan(shown)))
    return bool(np.isclose(shown, real, rtol=1e-6, atol=1e-12))


def map_values(drawing: dict[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Every matrix that a drawing of a heat map holds, by the column it shows."""
    if "counts" in drawing:
        tokens = decoded(drawing["counts"])
        rows, columns, all_of = drawing["divisors"]
        n_i, n_j, n = tokens.sum(1) / rows, tokens.sum(0) / columns, tokens.sum() / all_of
        with np.errstate(invalid="ignore"):
            return {"tokens": tokens, "conditional": tokens / n_i[:, None], "lift": tokens * n / np.outer(n_i, n_j)}
    for measure, figure in drawing["figures"].items():
        (trace,) = figure["data"]
        shown = re.findall(r"(?:^|<br>)(\w+): %\{", trace["hovertemplate"])
        assert [trace["z"], *trace["customdata"]] == shown
        assert shown[0] == measure
    return {name: decoded(plane) for name, plane in drawing["planes"].items()}


def compare_map(panel: dict[str, Any], drawing: dict[str, Any], rows: list[Row]) -> None:
    """Each row of the query is a cell, and every other cell is empty or 0."""
    figures = drawing.get("figures") or panel["shapes"][drawing["counts"]["shape"]]
    (trace,) = next(iter(figures.values()))["data"]
    y, x = MAPS[panel["name"]]
    places = {(str(row[y]), str(row[x])): row for row in rows}
    for name, values in map_values(drawing).items():
        seen = 0
        for (down, along), value in np.ndenumerate(values):
            row = places.get((trace["y"][down], trace["x"][along]))
            seen += row is not None
            if row is None:
                assert np.isnan(value) or value == 0, name
            elif name in COMPUTED:
                assert close(value, row["tokens"] ** -0.5 if row["tokens"] else None)
            else:
                assert close(value, row[name]), (name, row, value)
        assert seen == len(places) == len(rows)


def compare_curves(drawing: dict[str, Any], rows: list[Row]) -> None:
    """Each curve is a column of the query over the layers, or one layer's rows over the training steps."""
    rows = sorted(rows, key=lambda row: row["layer"])
    for measure, figure in drawing["figures"].items():
        for trace in figure["data"]:
            points = list(zip(trace["x"], trace["y"], strict=True))
            name = trace["name"]
            if layer := re.fullmatch(r"layer (\d+)", name):
                of_layer = sorted((row["train_step"], row[measure]) for row in rows if row["layer"] == int(layer[1]))
                assert len(points) == len(of_layer)
                pairs = zip(sorted(points), of_layer, strict=True)
                assert all(x == step and close(y, value) for (x, y), (step, value) in pairs)
            elif chance := re.fullmatch(r"random ([\d.]+)", name):
                assert any(np.isclose(row["random"], trace["y"][0]) for row in rows) and float(chance[1]) > 0
            else:
                assert [x for x, _ in points] == [str(row["layer"]) for row in rows]
                assert all(close(y, row[name]) for (_, y), row in zip(points, rows, strict=True)), (measure, name)
