"""`--expert-outputs`: norms and cosines follow from the experts' own matrices, for the same rows as routing."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import moewh
from moewh.ingest.inspect import inspect_model
from moewh.ingest.options import IngestOptions
from moewh.ingest.run import Progress, ingest
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import read_manifest, write_manifest
from moewh.warehouse.files.names import SCHEMA_RUN
from moewh.warehouse.sealing.seal import unseal
from moewh.warehouse.trust import verify
from moewh.warehouse.trust.rollups import compare
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.shipped import QUERIES
from tests.support import expert_arithmetic
from tests.support.damage import faults_of, set_manifest_right
from tests.support.families import FAMILIES, build, configuration, present
from tests.support.models import DEVICE, byte_tokenizer, save_model, tiny_model
from tests.support.observed_families import TEXTS, save, watch
from tests.support.runs import contents
from tests.support.synthetic import Run, random_run, random_warehouse, with_outputs, write_run

REQUIRED = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss")
UNUSUAL = ("longcat_flash", "inkling2_loop", "doge", "switch_transformers")
"""Identity experts, a model that loops, no container, tokens that are dropped."""
OUTPUTS, COUNTS = schema.EXPERT_OUTPUTS, schema.EXPERT_OUTPUT_COUNTS


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = ({"text": text, "domain": "even" if n % 2 == 0 else None} for n, text in enumerate(TEXTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(warehouse: Path, model: Path, prompts: Path, **options: Any) -> duckdb.DuckDBPyConnection:
    given = {"expert_outputs": True, "run_id": "r", **options}
    ingest(IngestOptions(model=str(model), prompts=(str(prompts),), **given), Layout(warehouse))
    return open_warehouse(Layout(warehouse))


# ------------------------------------------------------------------------------------------ against plain torch


@dataclass(frozen=True)
class Output:
    """One expert's output for one token, by hand."""

    norm: float
    cosine: float
    weight: float


@torch.no_grad()
def by_hand(name: str, model: Any, connection: duckdb.DuckDBPyConnection) -> dict[tuple[int, ...], Output]:
    """(prompt, position, layer, expert) → its output, from the expert's own matrices, of every choice stored."""
    family = next(family for family in FAMILIES if family.name == name)
    compute = getattr(expert_arithmetic, family.arithmetic)
    model = model.to(DEVICE)
    found = connection.sql("select layer, module from layers order by layer").fetchall()
    layers = [{"layer": layer, "module": module} for layer, module in found]
    chosen: dict[tuple[int, ...], list[tuple[int, float]]] = defaultdict(list)
    for *place, expert, weight in connection.sql(
        "select prompt_id, position, layer, expert, weight from routes"
    ).fetchall():
        chosen[tuple(place)].append((expert, weight))
    outputs: dict[tuple[int, ...], Output] = {}
    for prompt, text in enumerate(TEXTS):
        input_ids = torch.tensor([byte_tokenizer()(text)["input_ids"]], device=DEVICE)
        for row, (hidden_TH, _) in zip(layers, watch(model, family, layers, input_ids), strict=True):
            experts = model.get_submodule(row["module"])
            for position, x_H in enumerate(hidden_TH):
                pairs = chosen[prompt, position, row["layer"]]
                alone = {expert: compute(experts, expert, x_H).double() for expert, _ in pairs}
                total_H = sum(
                    (weight * alone[expert] for expert, weight in pairs), torch.zeros_like(x_H, dtype=torch.float64)
                )
                for expert, weight in pairs:
                    norm, length = float(alone[expert].norm()), float(total_H.norm())
                    cosine = float(alone[expert] @ total_H) / (norm * length)
                    outputs[prompt, position, row["layer"], expert] = Output(norm, cosine, weight)
    return outputs


@pytest.mark.parametrize("name", [*REQUIRED, *UNUSUAL])
def test_norms_and_cosines_are_those_of_the_experts_own_matrices(name: str, tmp_path: Path, prompts: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    if not present(family):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = save(family, tmp_path / "model")
    connection = run(tmp_path / "wh", tmp_path / "model", prompts)
    expected = by_hand(name, model, connection)
    stored = connection.sql("""
        select prompt_id, position, layer, expert, norm, cosine
        from expert_outputs join routes using (run_id, segment, token_id, layer, rank, expert)
    """).fetchall()
    assert len(stored) == len(expected)
    # Where an output is negligible next to the others (Doge's experts are single neurons), so is its error.
    nothing = 0.0 if name in REQUIRED else 1e-6 * max(output.norm for output in expected.values())
    for *place, norm, cosine in stored:
        output = expected[tuple(place)]
        assert norm == pytest.approx(output.norm, rel=1e-5, abs=nothing)
        assert cosine == pytest.approx(output.cosine, rel=1e-5, abs=1e-5)
    assert_saliency(connection, {key: output for key, output in expected.items() if key[1] > 0})  # 0 is special


def assert_saliency(connection: duckdb.DuckDBPyConnection, outputs: dict[tuple[int, ...], Output]) -> None:
    """REAP's S_j = 1 / |X_j| · Σ over X_j of g_j(x) ‖f_j(x)‖, and EAN, over values computed by hand."""
    of_expert: dict[tuple[int, ...], list[Output]] = defaultdict(list)
    for key, output in outputs.items():
        of_expert[key[2:]].append(output)
    rows = connection.sql("select layer, expert, choices, mean_norm, mean_weighted_norm from expert_saliency")
    assert sum(row[2] for row in rows.fetchall()) == len(outputs)
    for layer, expert, choices, mean_norm, saliency in rows.fetchall():
        seen = of_expert.get((layer, expert), [])
        assert choices == len(seen)
        if seen:
            assert mean_norm == pytest.approx(sum(o.norm for o in seen) / len(seen), rel=1e-5)
            assert saliency == pytest.approx(sum(o.weight * o.norm for o in seen) / len(seen), rel=1e-5)


def test_rows_are_those_of_routing_in_its_order_and_nothing_else_changes(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model", dtype=torch.bfloat16)
    run(tmp_path / "plain", folder, prompts, expert_outputs=False, segment_rows=100)
    run(tmp_path / "more", folder, prompts, segment_rows=100)
    plain, more = contents(tmp_path / "plain"), contents(tmp_path / "more")
    same = [name for name in plain if "/run_id=r/segment=" in name and not name.endswith("manifest.json")]
    assert len({Path(name).parent for name in same}) > 1
    assert all(plain[name] == more[name] for name in same)
    for segment in (tmp_path / "more").glob("segments/run_id=r/segment=*"):
        keys = ["token_id", "layer", "rank", "expert"]
        routing, outputs = (
            pq.read_table(segment / table.file, partitioning=None, columns=keys) for table in (schema.ROUTING, OUTPUTS)
        )
        assert routing.equals(outputs.cast(routing.schema))


def test_generated_tokens_have_outputs(tmp_path: Path, prompts: Path) -> None:
    connection = run(tmp_path / "wh", save_model(tmp_path / "model"), prompts, generate=3)
    generated = "select count(*) from expert_outputs join routing using (run_id, segment, token_id, layer, rank) "
    ((rows,), (routed,)) = (
        connection.sql(sql).fetchall()[0]
        for sql in (f"{generated} where kind = 'generated'", "select count(*) from routing where kind = 'generated'")
    )
    assert rows == routed > 0
    assert verify.check_rollups(Layout(tmp_path / "wh")) == []


def test_an_output_that_is_no_number_is_unknown(tmp_path: Path, prompts: Path) -> None:
    """An expert of zeros has no direction; one that overflows has no length. The routing rows of both stay.

    The first token is left out: its embedding is zero, so all experts tie, and their outputs are zero too.
    """
    model: Any = tiny_model("olmoe")
    last = model.model.layers[-1].mlp.experts
    with torch.no_grad():
        last.down_proj[0] = 0
        last.down_proj[1] = 3e38
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    connection = run(tmp_path / "wh", tmp_path / "model", prompts)
    seen = connection.sql("""
        select expert, count(*) > 0, min(norm), max(norm), count(cosine) from expert_outputs
        where layer = 2 and expert < 2 and token_id % (1 << 24) > 0 group by expert order by expert
    """).fetchall()
    assert seen == [(0, True, 0.0, 0.0, 0), (1, True, None, None, 0)]
    assert connection.sql(
        "select choices, mean_norm from expert_saliency where layer = 2 and expert = 1"
    ).fetchall() == [(0, None)]
    assert verify.check_rollups(Layout(tmp_path / "wh")) == []


# ------------------------------------------------------------------------------------------ asked, told, refused


def test_cost_is_reported_before_the_run_and_by_inspect(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    notes: list[str] = []
    options = IngestOptions(model=str(folder), prompts=(str(prompts),), expert_outputs=True)
    ingest(options, Layout(tmp_path / "wh"), Progress(note=notes.append))
    H, E, K = 32, 8, 3
    chosen, attention, router = 3 * H * 48 * K, 4 * H * H, H * E  # weights that a token uses in a layer
    more = chosen / (chosen + attention + router)
    assert notes == [
        f"expert_outputs take about {3 * K * 8} bytes per token before compression",
        f"expert_outputs run the chosen experts twice: about {more:.0%} more arithmetic",
    ]
    found = inspect_model(str(folder))
    assert found.expert_outputs_bytes_per_token == 3 * K * 8
    assert found.expert_outputs_arithmetic == pytest.approx(more)


def test_a_family_without_outputs_is_refused_before_it_is_loaded(tmp_path: Path, prompts: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "llama4")
    configuration(family).save_pretrained(tmp_path / "model")  # there are no weights to load
    with pytest.raises(UsageError, match=r"--expert-outputs: llama4_text .* multiply the experts' inputs"):
        run(tmp_path / "wh", tmp_path / "model", prompts)
    assert not (tmp_path / "wh").exists()
    with pytest.raises(UsageError, match="expert_outputs=True: llama4_text"):
        moewh.ingest(build(family), ["a"], tmp_path / "wh", tokenizer=byte_tokenizer(), expert_outputs=True)
    found = inspect_model(str(tmp_path / "model"))
    assert (found.expert_outputs_bytes_per_token, found.expert_outputs_arithmetic) == (None, None)


def test_a_recording_refuses_what_only_an_ingest_gives(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"moewh\.record has no option 'expert_outputs' \(moewh\.ingest has\)\."):
        moewh.record(tiny_model("olmoe"), byte_tokenizer(), tmp_path / "wh", expert_outputs=True)
    with pytest.raises(UsageError, match=r"moewh\.record has no option 'speed'\. Its options are pad_token_id, "):
        moewh.record(tiny_model("olmoe"), byte_tokenizer(), tmp_path / "wh", speed=1)


def test_a_run_without_them_keeps_its_identity(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    connection = run(tmp_path / "wh", folder, prompts, expert_outputs=False)
    ((options,),) = connection.sql("select options from runs").fetchall()
    assert "expert_outputs" not in json.loads(options)
    with pytest.raises(MoewhError, match="expert_outputs was not given, now True"):
        run(tmp_path / "wh", folder, prompts)


# ------------------------------------------------------------------------------------------ rows and their rollup


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    """`mixed` is sealed and has outputs, `step-20` is unsealed and has some; the others have none."""
    return random_warehouse(tmp_path_factory.mktemp("outputs") / "wh")


def test_rows_are_those_described(made: tuple[Layout, list[Run]]) -> None:
    layout, runs = made
    expected = []
    for one in runs:
        place = 0
        for number, segment in enumerate(one.segments):
            for prompt in segment:
                for position, token in enumerate(prompt.tokens):
                    for layer, outputs in token.outputs.items():
                        for rank, (expert, output) in enumerate(zip(token.experts(layer), outputs, strict=True)):
                            token_id = (place << schema.POSITION_BITS) + position
                            expected.append((one.run_id, number, token_id, layer, rank, expert, *output))
                place += 1
    with open_warehouse(layout) as connection:
        stored = connection.sql("from expert_outputs").fetchall()
    assert {row[0] for row in stored} == {"mixed", "step-20"}
    assert sorted(stored, key=repr) == sorted(expected, key=repr)


def brute_counts(one: Run) -> dict[tuple[Any, ...], list[Any]]:
    """(kind, domain, layer, expert) → choices, sums, largest, cosines and their sum, of the whole run."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for prompt in (prompt for segment in one.segments for prompt in segment):
        for token in prompt.tokens:
            for layer, outputs in token.outputs.items():
                for (expert, weight), (norm, cosine) in zip(token.choices[layer], outputs, strict=True):
                    if norm is not None and weight is not None:
                        key = (token.kind, prompt.domain, layer, expert)
                        entry = found.setdefault(key, [0, 0.0, 0.0, 0.0, 0.0, 0, None])
                        more = (1, norm, weight * norm, norm * norm)
                        entry[:4] = [before + add for before, add in zip(entry[:4], more, strict=True)]
                        entry[4] = max(entry[4], norm)
                        if cosine is not None:
                            entry[5:] = [entry[5] + 1, (entry[6] or 0.0) + cosine]
    return found


MERGED = ", ".join(
    f"{'max' if name == 'max_norm' else 'sum'}({name})" for name in (column.name for column in COUNTS.columns[4:])
)


def test_rollup_equals_brute_force_sealed_and_not(made: tuple[Layout, list[Run]]) -> None:
    layout, runs = made
    with open_warehouse(layout) as connection:
        defined = (QUERIES / "rollups" / f"{COUNTS.name}.sql").read_text()
        for source in (COUNTS.name, f"({defined})"):
            rows = connection.sql(f"select run_id, kind, domain, layer, expert, {MERGED} from {source} group by all")
            stored = {row[:5]: row[5:] for row in rows.fetchall()}
            expected = {(one.run_id, *key): entry for one in runs for key, entry in brute_counts(one).items()}
            assert stored.keys() == expected.keys()
            for key, entry in expected.items():
                assert [value is None for value in stored[key]] == [value is None for value in entry]
                assert [v or 0 for v in stored[key]] == pytest.approx([v or 0 for v in entry], rel=1e-9), key
        assert connection.sql(f"select distinct run_id, segment is null from {COUNTS.name} order by 1").fetchall() == [
            ("mixed", True),
            ("step-20", False),
        ]
    assert not (layout.sealed("step-30") / COUNTS.file).exists()


def test_sums_add_in_row_order(made: tuple[Layout, list[Run]]) -> None:
    """Without tolerance: exactly the sums that one thread gets, row by row."""
    layout, _ = made
    folder = layout.segment("step-20", 0)
    tables = {name: pq.read_table(folder / f"{name}.parquet", partitioning=None) for name in ("routing", OUTPUTS.name)}
    sums: dict[tuple[Any, ...], list[float]] = {}
    for row, output in zip(tables["routing"].to_pylist(), tables[OUTPUTS.name].to_pylist(), strict=True):
        if output["norm"] is not None:
            entry = sums.setdefault(tuple(row[key] for key in ("kind", "domain", "layer", "expert")), [0.0, 0.0])
            entry[0] += output["norm"]
            entry[1] += row["weight"] * output["norm"]
    stored = pq.read_table(folder / COUNTS.file, partitioning=None).to_pylist()
    keys = [tuple(row[key] for key in ("kind", "domain", "layer", "expert")) for row in stored]
    assert {key: [row["norm_sum"], row["weighted_norm_sum"]] for key, row in zip(keys, stored, strict=True)} == sums
    assert keys == sorted(keys, key=lambda key: (key[0], key[1] is None, key[1] or "", *key[2:]))


# ------------------------------------------------------------------------------------------ damage and age


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Two runs of two segments: `with` has outputs, `without` has none."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    shape = {0: (6, 2), 2: (5, 3)}
    for one in (with_outputs(random_run("with", 1, shape), 2), random_run("without", 3, shape)):
        write_run(layout, one)
    return layout


def ask(layout: Layout, sql: str) -> list[tuple[Any, ...]]:
    with open_warehouse(layout) as connection:
        return connection.execute(sql).fetchall()


def test_a_segment_that_lacks_the_rollup_of_its_outputs_is_named(layout: Layout) -> None:
    folder = layout.segment("with", 1)
    (folder / COUNTS.file).unlink()
    for view in (COUNTS.name, "expert_saliency", f"{COUNTS.name} where run_id = 'without'"):
        with pytest.raises(duckdb.Error, match=re.escape(f"segment {folder} lacks {COUNTS.file}")):
            ask(layout, f"select count(*) from {view}")
    set_manifest_right(folder)  # even if the manifest says that it was never there
    assert (COUNTS.file, "is missing") in {(fault.file, fault.why) for fault in faults_of(layout)}
    assert ask(layout, "select count(*) > 0 from expert_load") == [(True,)]


@pytest.mark.parametrize("change", ["rollup changed", "rows gone"])
def test_outputs_that_do_not_add_up_are_found(change: str, layout: Layout) -> None:
    folder = layout.segment("with", 0)
    table = COUNTS if change == "rollup changed" else OUTPUTS
    rows = pq.read_table(folder / table.file, partitioning=None).to_pylist()
    if change == "rollup changed":
        rows[2]["max_norm"] *= 1.01
    pq.write_table(
        pa.Table.from_pylist(rows[: None if table is COUNTS else -1], table.arrow()),
        folder / table.file,
        write_page_checksum=True,
    )
    set_manifest_right(folder)
    with open_engine("duckdb", None, layout, Limits()) as asking:
        assert {(f.table, f.run_id, f.segment) for f in compare(asking)} <= {(COUNTS.name, "with", 0)}
        assert list(compare(asking)) or change == "rows gone"
    if change == "rows gone":
        assert [fault.file for fault in faults_of(layout) if fault.folder == folder] == [OUTPUTS.file]


def test_a_sealed_run_that_lacks_the_rollup_is_named(made: tuple[Layout, list[Run]], tmp_path: Path) -> None:
    layout, _ = random_warehouse(tmp_path / "wh")
    folder = layout.sealed("mixed")
    (folder / COUNTS.file).unlink()
    with pytest.raises(duckdb.Error, match=f"run mixed is sealed and lacks {COUNTS.file}"):
        ask(layout, "select count(*) from expert_saliency")
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.identity, None)  # even if the manifest says that it was never there
    assert (COUNTS.file, "is missing") in {(fault.file, fault.why) for fault in faults_of(layout)}
    unseal(layout, "mixed")
    assert ask(layout, "select count(*) from expert_saliency") == ask(made[0], "select count(*) from expert_saliency")


def as_before_outputs(layout: Layout) -> None:
    """Turn the warehouse into one of the schema without expert outputs."""
    newer = [table for table in schema.TABLES if table.since > 1]
    for folder in [*layout.root.rglob(f"run_id={SCHEMA_RUN}"), *layout.root.rglob("segment=*"), layout.run("without")]:
        for table in newer:
            (folder / table.file).unlink(missing_ok=True)
        if (folder / "manifest.json").is_file():
            manifest = read_manifest(folder)
            write_manifest(folder, manifest.identity, manifest.segment)
            text = (folder / "manifest.json").read_text()
            (folder / "manifest.json").write_text(text.replace('"schema": 2', '"schema": 1'))


def test_a_warehouse_from_before_answers_no_rows_and_can_be_added_to(tmp_path: Path, prompts: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    write_run(layout, random_run("without", 3, {0: (6, 2)}))
    as_before_outputs(layout)
    before = contents(layout.root)
    for view in (OUTPUTS.name, COUNTS.name, "expert_saliency"):
        assert ask(layout, f"from {view}") == []
    assert ask(layout, "select count(*) > 0 from expert_load") == [(True,)]
    assert faults_of(layout) == []
    assert verify.check_rollups(layout) == []
    assert contents(layout.root) == before
    run(layout.root, save_model(tmp_path / "model"), prompts)
    assert ask(layout, "select distinct run_id from expert_saliency") == [("r",)]
    assert np.isfinite(ask(layout, "select max(mean_weighted_norm) from expert_saliency")[0][0])
    assert faults_of(layout) == []
