"""Exports, read back as their consumers read them."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from moewh.cli.main import main
from moewh.warehouse.answer.export import export_names
from moewh.warehouse.files.layout import Layout
from tests.support.synthetic import Run, empty_warehouse, random_run, without_ranks, write_run
from tests.support.traces import config, rows_of, traced, write_plain

LAYERS = {1: (8, 2), 2: (8, 2)}


@pytest.fixture(scope="module")
def run() -> Run:
    made = random_run("exported", 1, LAYERS, prompts=12)
    made.fields["num_hidden_layers"] = 4
    return made


@pytest.fixture(scope="module")
def layout(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = empty_warehouse(tmp_path_factory.mktemp("export") / "wh")
    write_run(layout, run)
    return layout


def export(layout: Layout, form: str, target: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["export", form, "-o", str(target), "--warehouse", str(layout.root), *more])


def exported(layout: Layout, form: str, target: Path, *more: str) -> Path:
    result = export(layout, form, target, *more)
    assert result.exit_code == 0, result.output
    assert [path.name for path in target.parent.iterdir()] == [target.name], "nothing else is left"
    return target


def test_an_incomplete_run_is_named_so(run: Run, tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, replace(run, fields={**run.fields, "segments_planned": 3}))
    says = "Wrote run exported to {}. The run is not complete: the file holds its segments so far.\n"
    for form in export_names():
        assert export(layout, form, tmp_path / form).output == says.format(tmp_path / form)
    whole = empty_warehouse(tmp_path / "whole")
    write_run(whole, run)
    assert export(whole, "eplb", tmp_path / "x.npy").output == f"Wrote run exported to {tmp_path / 'x.npy'}.\n"


def load_of(run: Run, domain: str | None = None) -> np.ndarray[Any, Any]:
    """Tokens by layer and expert, from the run's description."""
    counts = np.zeros((len(LAYERS), 8), np.int64)
    for prompt in (prompt for segment in run.segments for prompt in segment):
        for token in prompt.tokens:
            if token.counted and domain in (None, prompt.domain):
                for place, layer in enumerate(LAYERS):
                    np.add.at(counts[place], token.experts(layer), 1)
    return counts


def test_every_format_is_tested() -> None:
    assert export_names() == ["committee-audit", "eplb", "sglang", "tensorrt-llm"]


@pytest.mark.parametrize("name", export_names())
def test_help_says_what_a_format_is(name: str) -> None:
    shown = " ".join(CliRunner().invoke(main, ["export", "--help"]).output.split())
    file = import_module(f"moewh.warehouse.answer.exports.{name.replace('-', '_')}")
    assert f"{name} {(file.__doc__ or '').splitlines()[0]}" in shown


@pytest.mark.parametrize("domain", [None, "code"])
def test_sglang_reads_a_row_per_hidden_layer(domain: str | None, run: Run, layout: Layout, tmp_path: Path) -> None:
    """As expert_location.py does: a JSON object, torch.tensor(logical_count), [layers, experts]."""
    more = () if domain is None else ("--domain", domain)
    data = json.loads(exported(layout, "sglang", tmp_path / "load.json", *more).read_text())
    count = torch.tensor(data["logical_count"])
    assert count.shape == (4, 8)
    assert count[[0, 3]].sum() == 0
    assert count[[1, 2]].tolist() == load_of(run, domain).tolist()


def test_eplb_takes_the_matrix(run: Run, layout: Layout, tmp_path: Path) -> None:
    weight = torch.from_numpy(np.load(exported(layout, "eplb", tmp_path / "w.npy"), allow_pickle=False))
    assert weight.tolist() == load_of(run).tolist()


def test_eplb_places_experts_by_the_matrix(layout: Layout, tmp_path: Path) -> None:
    """DeepSeek's own function accepts the file, and our figure for its placement agrees with its result."""
    eplb = pytest.importorskip("eplb", reason="eplb.py of github.com/deepseek-ai/EPLB is not on PYTHONPATH")
    gpus, replicas = 4, 12
    weight = torch.from_numpy(np.load(exported(layout, "eplb", tmp_path / "w.npy")))
    experts_LR, _, copies_LE = eplb.rebalance_experts(weight, replicas, 4, 2, gpus)
    gpu_of_R = np.arange(replicas) // (replicas // gpus)
    rows = [
        {"layer": layer, "expert": int(expert), "gpu": int(gpu)}
        for experts_R, layer in zip(experts_LR, LAYERS, strict=True)
        for expert, gpu in zip(experts_R, gpu_of_R, strict=True)
    ]
    (tmp_path / "placement.json").write_text(json.dumps(rows))
    each_LR = (weight / copies_LE).gather(1, experts_LR).numpy()
    loads_LG = np.stack([np.bincount(gpu_of_R, loads, gpus) for loads in each_LR])
    words = ["query", "placement_quality", "-p", f"placement={tmp_path / 'placement.json'}", "--format", "json"]
    answer = json.loads(CliRunner().invoke(main, [*words, "--warehouse", str(layout.root)]).output)
    assert [row["imbalance"] for row in answer] == pytest.approx(loads_LG.max(axis=1) / loads_LG.mean(axis=1))


def test_tensorrt_llm_reads_statistics(run: Run, layout: Layout, tmp_path: Path) -> None:
    folder = exported(layout, "tensorrt-llm", tmp_path / "statistics")
    assert json.loads((folder / "meta_info.json").read_text()) == {"num_experts": 8, "num_experts_per_token": 2}
    records = load_file(folder / "rank0.safetensors")
    assert {key: tensor.tolist() for key, tensor in records.items()} == {
        f"0_{layer}": row.tolist() for layer, row in zip(LAYERS, load_of(run), strict=True)
    }


def test_tensorrt_llm_comes_in_again(layout: Layout, run: Run, tmp_path: Path) -> None:
    folder = exported(layout, "tensorrt-llm", tmp_path / "statistics")
    model = config(tmp_path / "model")
    words = ["import", "tensorrt-llm", str(folder), "--model", str(model), "--warehouse", str(tmp_path / "wh")]
    assert CliRunner().invoke(main, words).exit_code == 0
    again = export(Layout(tmp_path / "wh"), "eplb", tmp_path / "w.npy")
    assert again.exit_code == 0, again.output
    assert np.load(tmp_path / "w.npy").tolist() == load_of(run).tolist()


def test_committee_audit_has_mean_weights(run: Run, layout: Layout, tmp_path: Path) -> None:
    with exported(layout, "committee-audit", tmp_path / "audit.csv").open() as file:
        rows = list(csv.DictReader(file))
    sums: dict[tuple[int, str, int], float] = defaultdict(float)
    tokens: dict[tuple[int, str], int] = defaultdict(int)
    for prompt in (prompt for segment in run.segments for prompt in segment):
        domain = prompt.domain or "unlabelled"
        for token in (token for token in prompt.tokens if token.counted):
            for layer, chosen in token.choices.items():
                tokens[layer, domain] += 1
                for expert, weight in chosen:
                    sums[layer, domain, expert] += weight or 0
    assert {(int(r["layer"]), r["domain"], int(r["expert_idx"])) for r in rows} == sums.keys()
    for row in rows:
        key = (int(row["layer"]), row["domain"], int(row["expert_idx"]))
        mean = sums[key] / tokens[key[:2]]
        assert float(row["expert_weight"]) == pytest.approx(mean, rel=1e-9)
        better = [other for other in sums if other[:2] == key[:2] and (-sums[other], other) < (-sums[key], key)]
        assert int(row["topk_rank"]) == len(better)


def test_committee_audit_merges_no_domains(run: Run, tmp_path: Path) -> None:
    """Prompts without a domain and a domain of the name that they would get are two domains."""
    layout, target = empty_warehouse(tmp_path / "wh"), tmp_path / "out" / "audit.csv"
    target.parent.mkdir()
    named = [[replace(p, domain=p.domain and "unlabelled") for p in prompts] for prompts in run.segments]
    write_run(layout, replace(run, segments=named))
    result = export(layout, "committee-audit", target)
    assert (result.exit_code, list(target.parent.iterdir())) == (1, [])
    assert "has prompts without a domain and a domain 'unlabelled'" in result.output
    exported(layout, "committee-audit", target, "--domain", "unlabelled")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["eplb", "--run", "exportd"], 1, "there is no run 'exportd'. Did you mean 'exported'"),
        (["eplb", "--domain", "cod"], 1, "there is no domain 'cod' in run exported. Did you mean 'code'"),
        (["elpb"], 2, "'elpb' is not one of"),
    ],
)
def test_wrong_export_is_reported(words: list[str], code: int, said: str, layout: Layout, tmp_path: Path) -> None:
    result = export(layout, words[0], tmp_path / "out", *words[1:])
    assert (result.exit_code, said in result.output) == (code, True), result.output
    assert list(tmp_path.iterdir()) == []


def test_export_of_what_is_not_there(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    assert "there are no runs. `moewh ingest` makes one." in export(layout, "eplb", tmp_path / "w.npy").output
    write_run(layout, random_run("narrow", 1, {0: (4, 2), 1: (8, 2)}))
    assert (
        "run narrow has layers of 4 and of 8 experts, which do not form a matrix."
        in export(layout, "eplb", tmp_path / "w.npy").output
    )
    write_run(layout, without_ranks(random_run("plain", 1, LAYERS), "plain"))
    result = export(layout, "committee-audit", tmp_path / "audit.csv", "--run", "plain")
    assert "run plain has no weights" in result.output
    (tmp_path / "statistics").mkdir()
    result = export(layout, "tensorrt-llm", tmp_path / "statistics", "--run", "plain")
    assert (result.exit_code, "is an existing folder" in result.output) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["statistics", "wh"]


def test_export_of_an_import(tmp_path: Path) -> None:
    """A trace without ranks and weights has load like any other run."""
    trace = traced()
    (file,) = write_plain(tmp_path, trace)
    layout = Layout(tmp_path / "wh")
    words = ["import", "plain", str(file), "--model", str(config(tmp_path / "model")), "--warehouse", str(layout.root)]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert export(layout, "eplb", tmp_path / "w.npy").exit_code == 0
    counts = np.zeros((2, 8), np.int64)
    for _, _, layer, _, expert, _ in rows_of(layout):
        counts[layer - 1, expert] += 1
    assert np.load(tmp_path / "w.npy").tolist() == counts.tolist()
