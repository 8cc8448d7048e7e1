"""`moewh report`: its numbers equal the queries', its texts stay text, and it works with any warehouse."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import moewh
from moewh.cli.main import main
from moewh.plots import FIGURES
from moewh.plots.texts import visible
from moewh.report import contents
from moewh.report.page import plotly_script
from moewh.warehouse.files.layout import Layout
from tests.support import synthetic
from tests.support.hostile import HOSTILE
from tests.support.opened import opened
from tests.support.report_pages import (
    MAPS,
    asked,
    compare_curves,
    compare_map,
    contents_of,
    decoded,
    panel_of,
    write_report,
)
from tests.support.synthetic import (
    Prompt,
    Run,
    Token,
    empty_warehouse,
    random_run,
    random_warehouse,
    without_ranks,
    write_run,
)
from tests.support.traces import config, write_llama_imatrix

SERIES = {"balance_over_training", "saturation"}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("report") / "wh")[0]


@pytest.fixture(scope="module")
def page(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(layout, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def data(page: str) -> dict[str, Any]:
    return contents_of(page)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is in every report, whatever its figures: they take most of its time."""
    monkeypatch.setattr(contents, "panels", list)


def report(layout: Layout, *options: str) -> tuple[int, str]:
    """Return the exit code and output of the command."""
    done = CliRunner().invoke(main, ["report", "--warehouse", str(layout.root), *options])
    return done.exit_code, done.output


@pytest.mark.parametrize("name", sorted({*FIGURES} - {"top_tokens"}))
def test_numbers_are_those_of_the_query_named(name: str, layout: Layout, data: dict[str, Any]) -> None:
    panel = panel_of(data, name)
    assert panel["drawings"]
    for drawing in panel["drawings"]:
        rows = asked(layout, drawing["command"])
        if "domain" in drawing:
            rows = [row for row in rows if row["domain"] == drawing["domain"]]
        assert {row["run_id"] for row in rows} == set(drawing["runs"])
        if name in MAPS:
            compare_map(panel, drawing, rows)
        else:
            compare_curves(drawing, rows)


@pytest.mark.parametrize("name", sorted({*FIGURES} - {"top_tokens"}))
def test_each_selection_that_has_rows_is_drawn_once(name: str, layout: Layout, data: dict[str, Any]) -> None:
    """By the rows of the whole query."""
    panel = panel_of(data, name)
    columns = ["reference_run_id"] if name in SERIES else [{"run": "run_id"}.get(part, part) for part in panel["by"]]
    query = panel["drawings"][0]["command"].split()[2:4]
    source = re.search(r"from (\w+)", panel["drawings"][0]["command"])
    command = f'moewh query -c "from {source[1]}"' if source else f"moewh query {query[0]}"
    expected = {tuple(row[column] for column in columns) for row in asked(layout, command)}
    assert len(panel["drawings"]) == len(expected)
    if name not in SERIES:
        drawn = {(drawing["runs"][0], *(drawing[part] for part in panel["by"][1:])) for drawing in panel["drawings"]}
        assert drawn == expected


def test_top_tokens_are_those_of_the_query(layout: Layout, data: dict[str, Any]) -> None:
    table = panel_of(data, "top_tokens")["table"]
    columns = {name: decoded(spec) for name, spec in table["columns"].items()}
    shown: dict[tuple[str, int, int], list[tuple[Any, ...]]] = {}
    for run, layer, expert, text, *numbers in zip(*columns.values(), strict=True):
        place = table["runs"][int(run)], int(layer), int(expert)
        shown.setdefault(place, []).append((table["texts"][int(text)], *numbers))
    rows = asked(layout, 'moewh query -c "from expert_token_affinity where tokens >= 10"')
    rows.sort(key=lambda row: (-row["lift"], -row["tokens"], row["vocab_id"]))
    expected: dict[tuple[str, int, int], list[tuple[Any, ...]]] = {}
    for row in rows:
        text = visible(row["token"]) or f"#{row['vocab_id']}"
        best = expected.setdefault((row["run_id"], row["layer"], row["expert"]), [])
        best.append((text, row["tokens"], np.float32(row["share_of_token"]), np.float32(row["lift"])))
    assert shown == {place: best[:10] for place, best in expected.items()}
    (run, layer, expert), best = max(shown.items(), key=lambda item: len(item[1]))
    command = f"moewh query expert_top_tokens -p run={run} -p layer={layer} -p expert={expert}"
    assert [(row["tokens"], np.float32(row["lift"])) for row in asked(layout, command)][:10] == [
        (tokens, lift) for _, tokens, _, lift in best
    ]


def test_runs_and_prompts_are_those_of_the_warehouse(layout: Layout, data: dict[str, Any]) -> None:
    runs = (
        opened(layout.root).execute("select run_id, tokens, prompts from runs order by created_at, run_id").fetchall()
    )
    assert [(run["run_id"], run["tokens"], run["prompts"]) for run in data["runs"]] == runs
    with moewh.open(layout.root) as warehouse:
        for run_id, told in data["prompts"].items():
            ids = [prompt["prompt"] for prompt in told["prompts"]]
            assert told == moewh.plots.tokens(warehouse, ids, run=run_id).data
            assert len({prompt["domain"] for prompt in told["prompts"]}) == 3, "each domain has its turn"
    assert set(data["prompts"]) == {run_id for run_id, *_ in runs}


def test_run_domain_and_prompts_can_be_chosen(layout: Layout, tmp_path: Path) -> None:
    options = ("--run", "007", "--run", "mixed", "--domain", "code", "--prompts", "1")
    data = contents_of(write_report(layout, tmp_path / "r.html", *options))
    assert [run["run_id"] for run in data["runs"]] == ["007", "mixed"]
    assert [run["domains"] for run in data["runs"]] == [["code"], ["code"]]
    drawings = [drawing for panel in data["panels"] for drawing in panel["drawings"]]
    assert {run_id for drawing in drawings for run_id in drawing["runs"]} == {"007", "mixed"}
    assert {drawing.get("domain") for drawing in drawings} == {None, "code"}
    assert [len(told["prompts"]) for told in data["prompts"].values()] == [1, 1]
    assert {told["prompts"][0]["domain"] for told in data["prompts"].values()} == {"code"}


@pytest.mark.parametrize("chosen", [("step-20", "step-1"), ("007", "step-30")])
def test_no_other_run_is_in_the_page(chosen: tuple[str, ...], layout: Layout, tmp_path: Path) -> None:
    """Nor are the numbers of the other checkpoints of a run's series."""
    options = [part for run_id in chosen for part in ("--run", run_id)]
    data = contents_of(write_report(layout, tmp_path / "report.html", *options))
    with moewh.open(layout.root) as found:
        every = found.sql("select run_id, train_step from runs").fetchall()
    others = {run_id for run_id, _ in every} - set(chosen)
    assert not [run_id for run_id in others if json.dumps(run_id) in json.dumps(data)]
    steps = {step for run_id, step in every if run_id in chosen and step is not None}
    for name in ("saturation", "balance_over_training"):
        (drawing,) = panel_of(data, name)["drawings"]
        assert set(drawing["runs"]) == {run_id for run_id in chosen if run_id.startswith("step")}
        for figure in drawing["figures"].values():
            assert {step for trace in figure["data"] for step in trace["x"]} == steps


@pytest.mark.usefixtures("no_figures")
def test_no_prompts_and_more_than_there_are(layout: Layout, tmp_path: Path) -> None:
    none = contents_of(write_report(layout, tmp_path / "report.html", "--run", "007", "--prompts", "0"))
    assert none["prompts"] == {}
    data = contents_of(write_report(layout, tmp_path / "report.html", "--run", "007", "--prompts", str(10**30)))
    assert len(data["prompts"]["007"]["prompts"]) == data["runs"][0]["prompts"] > 0


def test_page_asks_nothing_of_the_network(page: str) -> None:
    ours = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", page, flags=re.DOTALL)
    assert "default-src 'none'" in ours
    assert re.findall(r"https?://|//[a-z]+\.|\bsrc=|<link|@import|url\(|fetch\(|XMLHttpRequest", ours) == []


def hostile_warehouse(root: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Tokens, domains and what describes the run are hostile; each token occurs often enough for the tables."""
    monkeypatch.setattr(synthetic, "WORDS", HOSTILE)
    layout = empty_warehouse(root)
    told = [Token(number, {n: [(number % 3, 0.5), (3, 0.25)] for n in (0, 1)}) for number in range(len(HOSTILE))]
    prompts = [Prompt(told * 10, domain) for domain in HOSTILE]
    facts = {"model": HOSTILE[0], "revision": HOSTILE[5], "series": HOSTILE[7], "tokens_key": "t", "train_step": 3}
    write_run(layout, Run("hostile", {0: (4, 2), 1: (4, 2)}, [prompts], fields=facts))
    return layout


def test_hostile_texts_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = hostile_warehouse(tmp_path / "wh", monkeypatch)
    page = write_report(layout, tmp_path / "report.html", "--prompts", "20")
    data = contents_of(page)
    assert page.count("</script") == page.count("<script") == 4 + page.count("<script>") - 2
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202f\u2066-\u2069]", page)
    assert dict(data["domain_texts"]) == {domain: visible(domain) for domain in HOSTILE}
    assert set(data["runs"][0]["domains"]) == set(HOSTILE)
    assert data["runs"][0]["model"] == visible(HOSTILE[0])
    assert {*panel_of(data, "top_tokens")["table"]["texts"]} <= {visible(text) for text in HOSTILE}
    assert len(panel_of(data, "domains")["drawings"]) == len(HOSTILE)
    command = next(d["command"] for d in panel_of(data, "domains")["drawings"] if d["domain"] == HOSTILE[7])
    words = subprocess.run(
        ["bash", "-c", f"printf %s {command[len('moewh query -c ') :]}"], capture_output=True, check=True
    )
    assert words.stdout.decode() == f"from domain_specialization where run_id = 'hostile' and domain = '{HOSTILE[7]}'"


def cases() -> dict[str, list[Run]]:
    """Warehouses of every kind: a run's figures are its own, so the runs of different models lie in one."""
    plain = random_run("plain", 5, {0: (6, 2), 2: (6, 2)})
    no_domain = replace(plain, segments=[[replace(prompt, domain=None) for prompt in s] for s in plain.segments])
    one_domain = replace(plain, segments=[[replace(prompt, domain="all") for prompt in s] for s in plain.segments])
    return {
        "one run, no domain": [no_domain],
        "different models": [
            plain,
            replace(one_domain, run_id="one-domain"),
            random_run("one-layer", 1, {3: (4, 2)}),
            random_run("top-1", 2, {0: (4, 1), 1: (4, 1)}),
            without_ranks(plain, "told", entries=False),
            random_run("wide", 3, {0: (200, 8), 5: (12, 3)}, prompts=4),
        ],
        "no tokens at all": [replace(plain, run_id="no-tokens", segments=[[]])],
    }


MISSING = {
    "one-layer": {"transitions"},
    "top-1": {"co_routing"},
    "no-tokens": {"co_routing", "transitions", "domains", "repetition", "information"},
}
"""The figures that a run has no rows for."""


@pytest.mark.parametrize("case", cases())
def test_any_warehouse_has_a_report(case: str, tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    runs = cases()[case]
    for run in runs:
        write_run(layout, run)
    data = contents_of(write_report(layout, tmp_path / "report.html"))
    assert [run["run_id"] for run in data["runs"]] == [run.run_id for run in runs]
    for run in runs:
        drawn = {panel["name"] for panel in data["panels"] for one in panel["drawings"] if run.run_id in one["runs"]}
        missing = {*MAPS, "balance", "repetition", "information"} - {"saliency"} - drawn  # which none of these runs has
        assert missing == MISSING.get(run.run_id, set()), run.run_id
    assert all(panel["empty"] for panel in data["panels"])
    for told, run in zip(data["runs"], runs, strict=True):
        assert {layer["layer"]: (layer["experts"], layer["top_k"]) for layer in told["layers"]} == run.layers
    for name in MAPS:
        panel = panel_of(data, name)
        for drawing in panel["drawings"]:
            compare_map(panel, drawing, asked(layout, drawing["command"]))


def test_counts_alone_have_a_report(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    counts_LE = np.arange(1, 9 * 3 - 2).reshape(3, 8)
    (file,) = write_llama_imatrix(tmp_path, counts_LE)
    model = ["--model", str(config(tmp_path)), "--run-id", "counts"]
    done = CliRunner().invoke(main, ["import", "llama-imatrix", str(file), "--warehouse", str(layout.root), *model])
    assert done.exit_code == 0, done.output
    data = contents_of(write_report(layout, tmp_path / "report.html"))
    assert data["prompts"] == {}
    (drawing,) = panel_of(data, "load")["drawings"]
    compare_map(panel_of(data, "load"), drawing, asked(layout, drawing["command"]))


def test_an_empty_warehouse_has_none(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    code, output = report(layout, "-o", str(tmp_path / "report.html"))
    assert (code, output) == (1, f"moewh: there are no runs in {layout.root}. `moewh ingest` makes one.\n")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["-o", "{folder}"], 2, "is a directory"),
        (["-o", "{folder}/none/report.html"], 2, "there is no directory"),
        (["--run", "none"], 1, "there is no run 'none'"),
        (["--domain", "none"], 1, "there is no domain 'none'"),
        (["--run", "007", "--domain", "coda"], 1, "Did you mean 'code'?"),
        (["--prompts", "-1"], 2, "-1"),
    ],
)
def test_bad_input_is_one_line(options: list[str], code: int, said: str, layout: Layout, tmp_path: Path) -> None:
    before = tmp_path / "report.html"
    before.write_text("mine")
    asked_for = [option.format(folder=tmp_path) for option in options]
    output = [] if "-o" in options else ["-o", str(before)]
    got, text = report(layout, *output, *asked_for)
    assert (got, text.count("\n")) == (code, 1), text
    assert said in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert before.read_text() == "mine"


@pytest.mark.usefixtures("no_figures")
def test_a_report_that_fails_leaves_the_old_one(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.html"
    output.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, text = report(layout, "-o", str(output), "--run", "007")
    assert (code, "No space left" in text) == (1, True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_without_plotly_one_line_says_what_to_install(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> None:
        raise ModuleNotFoundError(package)

    plotly_script.cache_clear()
    monkeypatch.setattr("moewh.report.page.files", missing)
    monkeypatch.setattr(contents, "collect", None)  # which would take longest, and is not begun
    code, text = report(layout, "-o", str(tmp_path / "report.html"), "--run", "007")
    assert (code, text) == (2, "moewh: a report needs Plotly. Run `pip install 'moewh[report]'`.\n")
    assert importlib.resources.files("plotly").is_dir()


def test_of_large_runs_no_figure_reads_every_row(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saturation then covers only the first prompts, and the query shown agrees."""
    monkeypatch.setattr(contents, "MOST_ROWS", 1500)
    reading = [(name, panel) for name, panel in contents.panels() if panel.scans]
    monkeypatch.setattr(contents, "panels", lambda: reading)
    data = contents_of(write_report(layout, tmp_path / "report.html"))
    left_out = panel_of(data, "specialization")
    assert not left_out["drawings"] and "`moewh query specialization_shuffled`" in left_out["empty"]
    (drawing,) = panel_of(data, "saturation")["drawings"]
    assert re.fullmatch(r"moewh query saturation_of_prompts -p prompts=\d -p series=trained", drawing["command"])
    compare_curves(drawing, asked(layout, drawing["command"]))
