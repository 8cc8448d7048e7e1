"""placement_quality, compared with a computation over the run's description, and the placements it accepts."""

from __future__ import annotations

import json
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.warehouse.answer.query import Value
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from tests.support.brute_force import Rows
from tests.support.saved_queries import answer
from tests.support.synthetic import Run, empty_warehouse, random_run, write_run

LAYERS = {0: (6, 2), 2: (8, 3), 5: (6, 2)}
Placement = dict[tuple[int, int], set[int]]
"""(layer, expert) → its GPUs"""


@pytest.fixture(scope="module")
def run() -> Run:
    return random_run("placed", 1, LAYERS, prompts=12)


@pytest.fixture(scope="module")
def layout(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = empty_warehouse(tmp_path_factory.mktemp("placement") / "wh")
    write_run(layout, run)
    return layout


def drawn(seed: int, *, copies: int = 0) -> Placement:
    """Place each expert on one of three GPUs at random, and some on a second one."""
    rng = np.random.default_rng(seed)
    places = {(layer, e): {int(rng.integers(3))} for layer, (experts, _) in LAYERS.items() for e in range(experts)}
    for number in rng.choice(len(places), copies, replace=False):
        list(places.values())[number].add(int(rng.integers(3)))
    return places


def brute(run: Run, placement: Placement) -> Rows:
    gpus = sorted(set().union(*placement.values()))
    rows: Rows = []
    following = dict(pairwise(sorted(run.layers)))
    tokens = [token for token in run.tokens() if token.counted]
    for layer in sorted(run.layers):
        load = dict.fromkeys(gpus, 0.0)
        pairs, steps = [], []
        for token in tokens:
            for expert in token.experts(layer):
                for gpu in placement[layer, expert]:
                    load[gpu] += 1 / len(placement[layer, expert])
            pairs += [bool(placement[layer, a] & placement[layer, b]) for a, b in combinations(token.experts(layer), 2)]
            if layer in following:
                both = product(token.experts(layer), token.experts(following[layer]))
                steps += [bool(placement[layer, a] & placement[following[layer], b]) for a, b in both]
        imbalance = max(load.values()) / (sum(load.values()) / len(gpus))
        shares = [sum(found) / len(found) if found else None for found in (pairs, steps)]
        rows.append((run.run_id, layer, len(gpus), 0, imbalance, *shares))
    return rows


def text_of(placement: Placement) -> str:
    return ",".join(f"{layer}:{expert}:{gpu}" for (layer, expert), gpus in placement.items() for gpu in gpus)


@pytest.mark.parametrize("copies", [0, 7])
def test_placement_quality(copies: int, run: Run, layout: Layout) -> None:
    placement = drawn(3, copies=copies)
    found, expected = answer(layout, "placement_quality", {"placement": text_of(placement)}), brute(run, placement)
    assert len(found) == len(expected) == len(LAYERS)
    for row, wanted in zip(found, expected, strict=True):
        assert row[:4] == wanted[:4]
        for value, target in zip(row[4:], wanted[4:], strict=True):
            assert value == (None if target is None else pytest.approx(target, rel=1e-12))


def test_all_on_one_gpu_and_each_on_its_own(layout: Layout) -> None:
    one: Placement = {key: {0} for key in drawn(0)}
    values: dict[str, Value] = {"placement": text_of(one)}
    assert [row[4:6] for row in answer(layout, "placement_quality", values)] == [(1, 1)] * 3
    own: Placement = {(layer, expert): {expert} for layer, expert in one}
    assert [row[5] for row in answer(layout, "placement_quality", {"placement": text_of(own)})] == [0] * 3


def test_expert_without_a_gpu(layout: Layout) -> None:
    placement = drawn(3)
    del placement[2, 4]
    rows = answer(layout, "placement_quality", {"placement": text_of(placement), "run": "placed"})
    assert [row[3] for row in rows] == [0, 1, 0]
    assert rows[1][4:] == (None, None, None)
    assert rows[0][4] is not None
    assert rows[0][6] is None, "the next layer is not placed whole"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ((9, 0), r"there is no MoE layer 9, which the placement has, in .*MoE layers: 0, 2, 5\."),
        ((2, 8), r"there is no expert 8, which the placement has, at layer 2 in .*Experts: 0 to 7\."),
    ],
)
@pytest.mark.parametrize("values", [{}, {"run": "placed"}], ids=str)
def test_a_placement_of_another_model_is_refused(
    place: tuple[int, int], said: str, values: dict[str, Value], layout: Layout
) -> None:
    """It would add GPUs without experts, and with them imbalance."""
    text = text_of({**drawn(3), place: {7}})
    with pytest.raises(MoewhError, match=said):
        answer(layout, "placement_quality", {**values, "placement": text})


def test_a_placement_leaves_out_runs_of_other_models(run: Run, tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, run)
    write_run(layout, random_run("smaller", 2, {0: (6, 2), 2: (4, 2)}))
    rows = answer(layout, "placement_quality", {"placement": text_of(drawn(3))})
    assert {row[0] for row in rows} == {"placed"}


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_placement_from_a_file(suffix: str, layout: Layout, tmp_path: Path) -> None:
    placement = drawn(3, copies=5)
    rows = [
        {"layer": layer, "expert": expert, "gpu": gpu, "note": "x"}
        for (layer, expert), gpus in placement.items()
        for gpu in gpus
    ]
    path = tmp_path / f"placement{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    expected = answer(layout, "placement_quality", {"placement": text_of(placement)})
    assert answer(layout, "placement_quality", {"placement": str(path)}) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"there is no file .*placement\.json\."),
        ("[]", "cannot be read as a placement|has no rows"),
        ('[{"layer": 0, "expert": 1}]', "cannot be read as a placement"),
        ('[{"layer": 0, "expert": 1, "gpu": null}]', "row 0: layer = 0, expert = 1, gpu = None. Give whole numbers"),
        ('[{"layer": 0, "expert": 1, "gpu": -1}]', "row 0: layer = 0, expert = 1, gpu = -1"),
        ('[{"layer": 0, "expert": 1.5, "gpu": 1}]', "row 0: layer = 0, expert = 1.5, gpu = 1"),
        ("hello", "cannot be read as a placement"),
    ],
)
def test_bad_placement_is_reported(content: str | None, said: str, layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=said) as error:
        answer(layout, "placement_quality", {"placement": str(path)})
    assert len(str(error.value).splitlines()) == 1


def test_a_placement_is_a_file_or_a_text(layout: Layout) -> None:
    with pytest.raises(UsageError, match=r"placement is a \.parquet, \.json or \.jsonl file with layer, expert, gpu"):
        answer(layout, "placement_quality", {"placement": "placement.csv"})
