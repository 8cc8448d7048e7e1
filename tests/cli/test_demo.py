"""What the embedded model must show: specialised experts, far beyond chance, and routing that settles in training."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import moewh
from moewh.cli.demo import SERIES, lifts_by_chance
from moewh.cli.main import main
from moewh.ingest import demo
from moewh.ingest.options import IngestOptions
from moewh.ingest.run import ingest
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.opening import open_warehouse
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_run, without_ranks, write_run

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    made = Layout(tmp_path_factory.mktemp("demo") / "a user's")
    show_demo(made)
    return made


def show_demo(layout: Layout) -> str:
    """Run `moewh demo` and return what it prints."""
    done = CliRunner().invoke(main, ["demo", "--warehouse", str(layout.root)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_each_domain_has_an_expert_beyond_chance(layout: Layout) -> None:
    """Recounted from the rows: share at least 10 %, lift at least 1.5, above the 99th percentile by chance."""
    last = f"demo-{demo.checkpoints()[-1]}"
    with open_warehouse(layout) as connection:
        chance = lifts_by_chance(connection, last)
        rows = connection.execute(
            f"select domain, token_id, layer, expert from routes where run_id = '{last}' and kind <> 'special'"
        ).fetchall()
    tokens = Counter(domain for domain, _ in {(domain, token) for domain, token, *_ in rows})
    chosen = Counter((domain, layer, expert) for domain, _, layer, expert in rows)
    overall = Counter((layer, expert) for _, _, layer, expert in rows)
    assert sorted(chance) == sorted(tokens) == ["code", "json", "math", "prose"]
    for domain, number in tokens.items():
        shares = {place[1:]: count / number for place, count in chosen.items() if place[0] == domain}
        lifts = [share / (overall[place] / tokens.total()) for place, share in shares.items() if share >= 0.1]
        assert max(lifts) >= 1.5
        assert max(lifts) > chance[domain] > 1.0


def test_saturation_rises_to_one(layout: Layout) -> None:
    with open_warehouse(layout) as connection:
        rows = connection.execute(
            "select layer, saturation, random from router_saturation order by layer, train_step"
        ).fetchall()
    for layer in range(4):
        shares = [share for found, share, _ in rows if found == layer]
        assert len(shares) == len(demo.checkpoints())
        assert rows[0][2] == 4 / 16 < shares[0] < shares[1] < shares[-1] == 1.0


def test_try_next_works(layout: Layout, tmp_path: Path) -> None:
    """Each command as it is printed, in a shell and in another folder."""
    program = tmp_path / "moewh"
    program.write_text(f"#!{sys.executable}\nfrom moewh.cli.main import main\nmain()\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(Path(moewh.__file__).parent.parent)}
    commands = show_demo(layout).partition("Try next:\n")[2].splitlines()
    assert [command.split()[:2] for command in commands] == [
        ["moewh", name] for name in ("show", "query", "query", "shell")
    ]
    for command in commands:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), command
        assert done.stdout or command.split()[1] == "shell"


def test_the_notebook_answers_its_questions(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, and their results are recounted from the rows."""
    pytest.importorskip("marimo", reason="marimo is not installed")
    pytest.importorskip("plotly", reason="plotly is not installed")
    monkeypatch.setenv("MOEWH_WAREHOUSE", str(layout.root))
    outputs, names = runpy.run_path(str(REPOSITORY / "notebooks" / "demo.py"))["app"].run()
    shown = names["run"].value
    assert shown == f"demo-{demo.checkpoints()[-1]}"
    assert sum(output is not None for output in outputs) == 6  # the title and five answers
    with open_warehouse(layout) as connection:
        rows = connection.execute(
            "select prompt_id, token_id, layer, expert, domain from routes where run_id = $run and kind <> 'special' "
            "order by token_id, layer, rank",
            {"run": shown},
        ).fetchall()
    layer = int(names["layer"].value)
    at_layer: dict[int, list[int]] = {}
    for _, token, number, expert, _ in rows:
        if number == layer:
            at_layer.setdefault(token, []).append(expert)
    together = Counter(pair for chosen in at_layer.values() for pair in combinations(sorted(chosen), 2))
    for expert, other, tokens, *_ in names["pairs"].fetchall():
        assert tokens == together[expert, other]
    step = dict.fromkeys(number for _, _, number, *_ in rows)
    flow = names["flow"].fetchall()
    assert len(flow) == 10
    chosen_at = {(token, number, expert) for _, token, number, expert, _ in rows}
    for number, expert, following, other, tokens, *_ in flow:
        assert [number, following] == [n for n in step if n in (number, following)]
        assert tokens == sum(
            (token, following, other) in chosen_at for token, n, e in chosen_at if (n, e) == (number, expert)
        )
    counts = Counter((domain, number, expert) for _, _, number, expert, domain in rows)
    assert {(row[1], row[2], row[3]): row[4] for row in names["preferred"].fetchall()}.items() <= counts.items()
    assert {row[0] for row in names["tokens_of"].fetchall()} == {"code", "json", "math", "prose"}
    assert names["view"].data["run"] == shown
    settled = names["settled"].fetchall()
    assert [step for step, *_ in settled[:3]] == [40, 400, 2000]
    assert all(share == 1.0 for step, _, share, _ in settled if step == 2000)


ONE_LAYER = {0: (4, 1)}
NO_STEP = replace(random_run("no-step", 1, {0: (6, 2), 1: (6, 2)}), fields={"series": "s", "tokens_key": "t"})


@pytest.mark.parametrize(
    ("runs", "answers"),
    [
        ([], 1),  # in words, that there is no run
        ([random_run("top-1", 1, ONE_LAYER)], 6),
        ([replace(NO_STEP, run_id="checkpoint", fields={**NO_STEP.fields, "train_step": 1}), NO_STEP], 6),
        ([Run("only-special", {0: (6, 2)}, [[Prompt([Token(0, {0: [(1, 0.5), (2, 0.2)]}, "special")])]])], 6),
        ([Run("no-routes", {0: (6, 2)}, [[Prompt([Token(0, {})], "d")]])], 6),
        ([without_ranks(random_run("ids", 1, {0: (6, 2), 3: (6, 2)}), "ids", entries=False)], 6),
    ],
    ids=lambda value: value[0].run_id if isinstance(value, list) and value else None,
)
def test_the_notebook_says_what_a_run_lacks(
    runs: list[Run], answers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cell fails: where a figure has no rows, its place holds the reason."""
    pytest.importorskip("marimo", reason="marimo is not installed")
    pytest.importorskip("plotly", reason="plotly is not installed")
    layout = empty_warehouse(tmp_path / "wh")
    for run in runs:
        write_run(layout, run)
    monkeypatch.setenv("MOEWH_WAREHOUSE", str(layout.root))
    outputs, _ = runpy.run_path(str(REPOSITORY / "notebooks" / "demo.py"))["app"].run()
    assert sum(output is not None for output in outputs) == answers


def test_a_users_run_does_not_join_the_demo(layout: Layout) -> None:
    """The same tokens through the same checkpoint, by a run that sorts before the demo's."""
    before = show_demo(layout)
    mine = IngestOptions(model="demo", prompts=("demo",), revision=demo.checkpoints()[-1], run_id="a", dtype="bfloat16")
    ingest(mine, layout)
    assert show_demo(layout) == before
    with open_warehouse(layout) as connection:
        keys = connection.execute("select count(distinct tokens_key), count(distinct series) from runs").fetchall()
        compared = connection.execute(
            "select distinct run_id, reference_run_id from router_saturation order by all"
        ).fetchall()
        series = connection.execute("select run_id from runs where series = $series", {"series": SERIES}).fetchall()
    last = f"demo-{demo.checkpoints()[-1]}"
    runs = [f"demo-{revision}" for revision in demo.checkpoints()]
    assert keys == [(1, 2)]
    assert sorted(series) == [(run_id,) for run_id in runs]
    assert compared == [("a", "a"), *((run_id, last) for run_id in runs)]


def test_lifts_by_chance_are_those_of_every_labelling(tmp_path: Path) -> None:
    """Six prompts of two domains, each with its own share of expert 0: the 20 labellings give the quantile."""
    made = Layout(tmp_path / "wh")
    made.create()
    to_first = (0, 1, 2, 5, 8, 10)
    prompts = [
        Prompt([Token(1, {0: [(int(n >= first), 1.0)]}) for n in range(10)], "ab"[place % 2])
        for place, first in enumerate(to_first)
    ]
    write_run(made, Run("r", {0: (2, 1)}, [prompts]))
    best = []
    for labelling in range(2**6):
        mine = [first for place, first in enumerate(to_first) if labelling >> place & 1]
        if len(mine) == 3:
            shares = (sum(mine) / 30, 1 - sum(mine) / 30)
            overall = (sum(to_first) / 60, 1 - sum(to_first) / 60)
            best.append(max(s / o for s, o in zip(shares, overall, strict=True) if s >= 0.1))
    with open_warehouse(made) as connection:
        for quantile in (0.25, 0.5, 1.0):
            found = lifts_by_chance(connection, "r", quantile)
            near = [np.quantile(best, q) for q in (max(0, quantile - 0.1), min(1, quantile + 0.1))]
            assert all(near[0] <= lift <= near[1] for lift in found.values()), (quantile, found, near)


def test_demo_says_nothing_else(layout: Layout) -> None:
    """As its own process, which DuckDB ends with a report of what was not freed."""
    command = [sys.executable, "-m", "moewh", "demo", "--warehouse", str(layout.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    runs = [f"run demo-{name} is complete already; nothing was written." for name in demo.checkpoints()]
    assert done.stderr.splitlines() == runs
