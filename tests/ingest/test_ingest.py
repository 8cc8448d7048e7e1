"""Segments: cut, committed, resumed after a kill, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.ingest import demo
from moewh.ingest.model.loading import training_progress
from moewh.ingest.options import IngestOptions
from moewh.ingest.routing import LayerRouting, rank
from moewh.ingest.run import Summary, ingest
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from tests.support.faults import Server
from tests.support.models import MAX_LENGTH, byte_tokenizer, save_model
from tests.support.opened import viewed
from tests.support.runs import contents, write_prompts

SEGMENT_ROWS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 60)


def run(warehouse: Path, model: Path, prompts: Path, **options: Any) -> Summary:
    chosen = {"segment_rows": SEGMENT_ROWS, **options}
    return ingest(IngestOptions(model=str(model), prompts=(str(prompts),), **chosen), Layout(warehouse))


def test_same_command_gives_the_same_bytes(tmp_path: Path, model: Path, prompts: Path) -> None:
    first, second = run(tmp_path / "a", model, prompts), run(tmp_path / "b", model, prompts)
    assert first.segments == second.segments > 5
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_clock_in_a_segment_is_noticed(
    tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = schema.Table.arrow
    stamped = lambda table: arrow(table).with_metadata({"written": str(time.time_ns())})  # noqa: E731
    monkeypatch.setattr(schema.Table, "arrow", stamped)
    run(tmp_path / "a", model, prompts, limit=2)
    run(tmp_path / "b", model, prompts, limit=2)
    assert contents(tmp_path / "a") != contents(tmp_path / "b")


def test_segment_does_not_depend_on_the_others(tmp_path: Path, model: Path, prompts: Path) -> None:
    whole = run(tmp_path / "a", model, prompts)
    run(tmp_path / "b", model, prompts)
    layout = Layout(tmp_path / "b")
    lost = layout.segment(whole.run_id, 3)
    lost.rename(tmp_path / "lost")
    again = run(tmp_path / "b", model, prompts)
    assert len(again.written) == 1
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_complete_run_is_left_alone(tmp_path: Path, model: Path, prompts: Path) -> None:
    run(tmp_path, model, prompts)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(tmp_path, model, prompts).written == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (({}, {"series": "mine"}), r"--series is mine, but run 'r' began with tiny-[0-9a-f]+\. Leave --series out"),
        (({"series": "a"}, {"series": "b"}), "--series is b, but run 'r' began with a"),
        (({"train_step": 5}, {"train_step": 6}), "--train-step is 6, but run 'r' began with 5"),
        (({}, {"train_tokens": 0}), "--train-tokens is 0, but run 'r' began without one"),
        (({"series": "a", "train_step": 5}, {"series": "a", "train_step": 5}), None),
        (({"series": "a", "train_step": 5}, {}), None),
    ],
)
def test_a_run_keeps_its_labels(
    labels: tuple[Any, Any], says: str | None, tmp_path: Path, model: Path, prompts: Path
) -> None:
    """Whether it is complete or goes on."""
    begun, again = labels
    layout = Layout(tmp_path / "wh")

    def go(**labels: Any) -> list[Any]:
        run(layout.root, model, prompts, run_id="r", limit=2, **labels)
        return viewed(layout).execute("select series, train_step, train_tokens from runs").fetchall()

    before = go(**begun)
    for lost in ([], list(layout.segments("r").iterdir())):
        for segment in lost:
            shutil.rmtree(segment)
        if says is None:
            assert go(**again) == before
        else:
            with pytest.raises(UsageError, match=says):
                go(**again)
            assert not any(segment.exists() for segment in lost)
    assert go() == before


def test_killed_and_run_again_is_identical_to_undisturbed(tmp_path: Path, model: Path, server: Server) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    prompts = write_prompts(tmp_path / "p.jsonl", 300)
    planned = run(quiet, model, prompts).segments
    sizes = ["--segment-rows", str(SEGMENT_ROWS), "--batch-tokens", "8192"]
    command = ["ingest", "--model", str(model), "--prompts", str(prompts), *sizes, "--warehouse", str(killed)]
    for wanted in (1, 20):
        pid = server.start("moewh", arguments=command, root=str(killed))
        deadline = time.monotonic() + 60
        while len(list(killed.glob("segments/run_id=tiny*/segment=*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert server.wait(pid)["code"] == -signal.SIGKILL
        done = len(list(killed.glob("segments/run_id=tiny*/segment=*")))
        assert wanted <= done < planned, "the kill came too late to show anything"
        status = viewed(Layout(killed)).execute("select status, segments from runs").fetchall()
        assert status == [("running", done)]
    finished = run(killed, model, prompts)
    assert 0 < len(finished.written) < planned
    assert contents(killed) == contents(quiet)
    assert sorted(path.name for path in (killed / ".staging").iterdir()) == ["empty", "prompts"]
    assert [path.suffix for path in (killed / ".staging" / "prompts").iterdir()] == [".json"]
    assert viewed(Layout(killed)).execute("select status from runs").fetchall() == [("complete",)]


def test_manifest_tells_the_truth(tmp_path: Path, model: Path, prompts: Path) -> None:
    summary = run(tmp_path, model, prompts)
    for number, counts in enumerate(summary.written):
        folder = Layout(tmp_path).segment(summary.run_id, number)
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {path.name: path for path in folder.glob("*.parquet")}
        assert set(manifest["files"]) == set(files)
        for name, entry in manifest["files"].items():
            assert entry["bytes"] == files[name].stat().st_size
            assert entry["sha256"] == hashlib.sha256(files[name].read_bytes()).hexdigest()
            assert entry["rows"] == pq.read_table(files[name], partitioning=None).num_rows
        assert manifest["files"]["tokens.parquet"]["rows"] == counts.tokens
        assert manifest["files"]["routing.parquet"]["rows"] == counts.routing_rows == counts.tokens * 9


def test_routing_is_sorted_and_row_groups_keep_to_a_layer(tmp_path: Path, model: Path, prompts: Path) -> None:
    summary = run(tmp_path, model, prompts, segment_rows=10**6)
    path = Layout(tmp_path).segment(summary.run_id, 0) / "routing.parquet"
    file = pq.ParquetFile(path)
    keys = file.read(["layer", "token_id", "rank"]).to_pylist()
    assert keys == sorted(keys, key=lambda row: (row["layer"], row["token_id"], row["rank"]))
    layers = [file.read_row_group(group).column("layer").unique().to_pylist() for group in range(file.num_row_groups)]
    assert layers == [[0], [1], [2]]
    column = file.metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
    assert "DELTA_BINARY_PACKED" in column.encodings


def test_rank_is_by_weight_then_expert_for_any_floats() -> None:
    generator = np.random.default_rng(0)
    weights_TK = generator.choice([0.0, -0.0, -1.5, 2.0, 1e-30, -3e20, 0.25], (500, 5)).astype(np.float32)
    weights_TK[::50, 2] = np.nan
    ids_TK = np.argsort(generator.random((500, 9)), axis=1)[:, :5].astype(np.int32)
    ranked = rank(LayerRouting(ids_TK, weights_TK))
    assert ranked.weights_TK is not None
    for place in range(500):
        pairs = list(zip(weights_TK[place].tolist(), ids_TK[place].tolist(), strict=True))
        assert ranked.routed_T[place] == all(math.isfinite(weight) for weight, _ in pairs)
        if ranked.routed_T[place]:
            expected = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
            real = zip(ranked.weights_TK[place].tolist(), ranked.expert_ids_TK[place].tolist(), strict=True)
            assert list(real) == expected


def test_ranks_descend_and_ties_go_by_expert(tmp_path: Path, model: Path, prompts: Path) -> None:
    run(tmp_path, model, prompts)
    broken = viewed(Layout(tmp_path)).execute("""
        select count(*) from routing as a join routing as b using (run_id, segment, token_id, layer)
        where b.rank = a.rank + 1 and (b.weight > a.weight or (b.weight = a.weight and b.expert < a.expert))
    """)
    assert broken.fetchone() == (0,)


OVERFLOWING = "x" * (MAX_LENGTH + 40)


@pytest.mark.parametrize(
    ("rule", "status", "contexts"),
    [("truncate", "truncated", [MAX_LENGTH]), ("chunk", "chunked", [MAX_LENGTH, 42]), ("skip", "skipped", [])],
)
def test_overflow_rules(rule: str, status: str, contexts: list[int], tmp_path: Path, model: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", OVERFLOWING, "", "end")))
    run(tmp_path / "wh", model, path, on_overflow=rule, segment_rows=10**6)
    connection = viewed(Layout(tmp_path / "wh"))
    assert connection.execute("select status, num_tokens from prompts order by prompt_id").fetchall() == [
        ("ok", 6),
        (status, sum(contexts)),
        ("empty", 0),
        ("ok", 4),
    ]
    rows = connection.execute("""
        select context, position, kind from tokens where prompt_id = 1 order by position
    """).fetchall()
    expected = [(number, place == 0) for number, size in enumerate(contexts) for place in range(size)]
    assert rows == [
        (context, position, "special" if first else "prompt") for position, (context, first) in enumerate(expected)
    ]
    routed = connection.execute("select count(distinct token_id) from routing").fetchone()
    assert routed == (10 + sum(contexts),)


def test_chunk_is_a_context_of_its_own(tmp_path: Path, model: Path) -> None:
    chunked, alone = tmp_path / "chunked.jsonl", tmp_path / "alone.jsonl"
    chunked.write_text(json.dumps({"text": OVERFLOWING}))
    alone.write_text(json.dumps({"text": OVERFLOWING[MAX_LENGTH - 1 :]}))
    run(tmp_path / "a", model, chunked, on_overflow="chunk")
    run(tmp_path / "b", model, alone)
    query = """
        select layer, position - {shift}, rank, expert, round(weight, 5) from routes
        where position >= {shift} order by all
    """
    a = viewed(Layout(tmp_path / "a")).execute(query.format(shift=MAX_LENGTH)).fetchall()
    b = viewed(Layout(tmp_path / "b")).execute(query.format(shift=0)).fetchall()
    assert a == b
    assert len(a) == 42 * 9


def test_overflow_error_names_the_prompt(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", OVERFLOWING)))
    with pytest.raises(MoewhError, match=f"prompt 1 has {len(OVERFLOWING) + 1} tokens, over the maximum"):
        run(tmp_path / "wh", model, path, on_overflow="error")


def test_prompt_larger_than_a_segment_is_failed_and_named(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", "y" * 200, "end")))
    run(tmp_path / "wh", model, path, segment_rows=300)
    statuses = viewed(Layout(tmp_path / "wh")).execute("select status from prompts order by prompt_id").fetchall()
    assert statuses == [("ok",), ("failed",), ("ok",)]


def test_without_special_tokens(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("abc\n")
    run(tmp_path / "wh", model, path, special_tokens=False)
    connection = viewed(Layout(tmp_path / "wh"))
    assert connection.execute("select token, kind from tokens order by position").fetchall() == [
        (letter, "prompt") for letter in "abc"
    ]


def test_prompts_of_no_tokens_at_all_still_make_a_run(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n\n")
    run(tmp_path / "wh", model, path)
    connection = viewed(Layout(tmp_path / "wh"))
    assert connection.execute("select status, prompts, tokens from runs").fetchall() == [("complete", 2, 0)]
    assert connection.execute("select count(*) from layers").fetchone() == (3,)
    assert connection.execute("select sum(tokens) from expert_load").fetchone() == (0,)


def test_identity_follows_what_shapes_rows(tmp_path: Path, model: Path, prompts: Path) -> None:
    few = {"limit": 6, "segment_rows": 10**6}
    same = run(tmp_path, model, prompts, **few).run_id
    assert run(tmp_path, model, prompts, batch_tokens=64, **few).run_id == same
    others = [
        run(tmp_path, model, prompts, **{**few, **change}).run_id
        for change in ({"max_length": 20}, {"limit": 5}, {"special_tokens": False}, {"dtype": "bfloat16"})
    ]
    assert len({same, *others}) == 5


def test_moved_model_is_the_same_run_and_changed_weights_are_not(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "one" / "tiny")
    first = run(tmp_path / "wh", folder, prompts)
    folder.rename(tmp_path / "tiny")
    assert run(tmp_path / "wh", tmp_path / "tiny", prompts).written == []
    save_model(tmp_path / "tiny", seed=1)
    with pytest.raises(MoewhError, match="weights_sha256 was"):
        run(tmp_path / "wh", tmp_path / "tiny", prompts, run_id=first.run_id)


def test_tokens_key_is_shared_by_checkpoints(tmp_path: Path, prompts: Path) -> None:
    for step in (5, 10):
        folder = save_model(tmp_path / "tiny" / f"step{step}-tokens2M", seed=step)
        run(tmp_path / "wh", folder, prompts, limit=2)
    rows = viewed(Layout(tmp_path / "wh")).execute("""
        select train_step, train_tokens, count(*) over (partition by series, tokens_key) from runs order by 1
    """)
    assert rows.fetchall() == [(5, 2_000_000, 2), (10, 2_000_000, 2)]


@pytest.mark.parametrize(
    ("folders", "alike"),
    [
        (("a", "b"), False),
        (("olmoe", "olmoe-tuned"), False),
        (("one/model", "two/model"), False),
        (("main", "final"), False),
        (("checkpoint-500", "checkpoint-1000"), True),
        (("iter_0005000", "iter_0010000"), True),
        (("step5-tokens2M", "step10-tokens4M"), True),
        (("stage1-step5-tokens2M", "stage2-step10-tokens4M"), True),
        (("epoch=1-step=5", "epoch=2-step=10"), True),
        (("mine-checkpoint-5", "mine-checkpoint-10"), True),
        (("mine-checkpoint-5", "yours-checkpoint-5"), False),
        (("checkpoint-500", "final"), False),
        (("one/checkpoint-5", "two/checkpoint-5"), False),
    ],
)
def test_only_checkpoints_of_one_training_run_share_a_series(
    folders: tuple[str, str], alike: bool, tmp_path: Path, prompts: Path
) -> None:
    for seed, name in enumerate(folders):
        model = save_model(tmp_path / "models" / name, seed=seed, num_hidden_layers=1)
        run(tmp_path / "wh", model, prompts, limit=2)
    rows = viewed(Layout(tmp_path / "wh")).execute("select series from runs").fetchall()
    assert len(rows) == 2
    assert (len(set(rows)) == 1) is alike


def test_series_by_hand_and_of_one_shape_only(tmp_path: Path, prompts: Path) -> None:
    """A moved or copied folder is the same model, in the same series; `--series` overrides names."""
    first = save_model(tmp_path / "one" / "tiny")
    shutil.copytree(first, tmp_path / "two" / "tiny")
    steps = [save_model(tmp_path / "s" / f"step{layers}", num_hidden_layers=layers) for layers in (2, 3)]
    for number, folder in enumerate((first, tmp_path / "two" / "tiny", *steps)):
        run(tmp_path / "wh", folder, prompts, limit=2, run_id=f"r{number}")
    for number, folder in enumerate((first, steps[0])):
        run(tmp_path / "wh", folder, prompts, limit=2, run_id=f"by-hand-{number}", series="mine")
    series = dict(viewed(Layout(tmp_path / "wh")).execute("select run_id, series from runs").fetchall())
    assert series["r0"] == series["r1"] != series["r2"] != series["r3"]
    assert series["by-hand-0"] == series["by-hand-1"] == "mine"


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step5000-tokens20B", 5_000, 20 * 10**9),
        ("stage1-step150000-tokens1.5T", 150_000, 1_500 * 10**9),
        ("checkpoint-500", 500, None),
        ("iter_0005000", 5_000, None),
        ("epoch=3-step=1200", 1_200, None),
        ("checkpoint-9223372036854775807", 2**63 - 1, None),
        ("checkpoint-99999999999999999999", None, None),
        ("step5-tokens99999999999B", 5, None),
        (f"tokens{'9' * 400}", None, None),
        ("main", None, None),
        (None, None, None),
    ],
)
def test_training_progress_is_read_from_the_name(name: str | None, step: int | None, tokens: int | None) -> None:
    assert training_progress(name) == (step, tokens)


def test_several_checkpoints_in_one_command(tmp_path: Path, prompts: Path) -> None:
    """Each folder is a separate run of one series, named after its folder; repeated, the command writes nothing."""
    folders = [save_model(tmp_path / "tiny" / f"checkpoint-{step}", seed=step) for step in (5, 10)]
    models = [argument for folder in folders for argument in ("--model", str(folder))]
    command = ["ingest", *models, "--prompts", str(prompts), "--run-id", "mine", "--warehouse", str(tmp_path / "wh")]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0, first.output
    with viewed(Layout(tmp_path / "wh")) as connection:
        runs = connection.execute("select run_id, train_step, status from runs order by train_step").fetchall()
        assert runs == [("mine-checkpoint-5", 5, "complete"), ("mine-checkpoint-10", 10, "complete")]
        saturation = connection.execute("select run_id, saturation from router_saturation order by all").fetchall()
    assert {run_id for run_id, share in saturation if share == 1.0} == {"mine-checkpoint-10"}
    assert {run_id for run_id, _ in saturation} == {"mine-checkpoint-5", "mine-checkpoint-10"}
    assert CliRunner().invoke(main, command).output.count("nothing was written") == 2


def test_revisions_of_the_demo_in_one_command(tmp_path: Path) -> None:
    revisions = [argument for name in demo.checkpoints()[-2:] for argument in ("--revision", name)]
    command = ["ingest", "--model", "demo", *revisions, "--prompts", "demo", "--limit", "4"]
    done = CliRunner().invoke(main, [*command, "--warehouse", str(tmp_path / "wh")])
    assert done.exit_code == 0, done.output
    with viewed(Layout(tmp_path / "wh")) as connection:
        steps = connection.execute("select revision, train_step from runs order by train_step").fetchall()
    assert steps == [(name, int(name.removeprefix("step-"))) for name in demo.checkpoints()[-2:]]


def test_train_step_given_by_hand(tmp_path: Path, model: Path, prompts: Path) -> None:
    run(tmp_path / "wh", model, prompts, train_step=7, train_tokens=9)
    with viewed(Layout(tmp_path / "wh")) as connection:
        assert connection.execute("select train_step, train_tokens from runs").fetchall() == [(7, 9)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--revision", "a", "--revision", "b", "--train-step", "3"], "--train-step applies to one checkpoint"),
        (["--revision", "a", "--revision", "a"], "two checkpoints are called a"),
        (["--revision", "a", "--revision", "b", "--prompts", "-"], "standard input can be read only once"),
        (["--train-tokens", "-1"], "--train-tokens is -1. Give a whole number of at least 0"),
    ],
)
def test_what_several_checkpoints_cannot_share(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = ["ingest", "--model", "demo", "--prompts", "demo", *arguments, "--warehouse", str(tmp_path / "wh")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "wh").exists()


def test_hostile_labels_are_data(tmp_path: Path, model: Path) -> None:
    labels = ["'; drop view routes; --", "../../etc", "a/b", "x\x00y", "=cmd()", "run_id=7"]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": "hi", "domain": label}) + "\n" for label in labels))
    run(tmp_path / "wh", model, path)
    rows = viewed(Layout(tmp_path / "wh")).execute("select domain from prompts order by prompt_id").fetchall()
    assert [row[0] for row in rows] == labels
    assert byte_tokenizer()("hi")["input_ids"][0] == 0
