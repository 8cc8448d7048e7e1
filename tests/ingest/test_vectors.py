"""The opt-in tables: logits are the model's own, and the vectors make the router reproduce the stored routing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
import transformers

from moewh.ingest.options import IngestOptions
from moewh.ingest.run import Progress, ingest
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build
from tests.support.models import byte_tokenizer, save_model
from tests.support.opened import viewed
from tests.support.runs import contents

TEXTS = ("one", "a longer prompt of letters", "", "and\nthree")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(warehouse: Path, model: Path, prompts: Path, **options: Any) -> duckdb.DuckDBPyConnection:
    ingest(IngestOptions(model=str(model), prompts=(str(prompts),), **options), Layout(warehouse))
    return viewed(Layout(warehouse))


def vectors_of(connection: duckdb.DuckDBPyConnection, table: str, column: str, layer: int) -> torch.Tensor:
    """[T, width] of a layer, in the order of token_id."""
    rows = connection.execute(f"select {column} from {table} where layer = {layer} order by token_id").fetchall()
    return torch.tensor([row[0] for row in rows])


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "deepseek_v3", "gemma4"])
def test_stored_vectors_lead_the_router_to_the_stored_routing(name: str, tmp_path: Path, prompts: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    folder = tmp_path / "model"
    build(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    connection = run(tmp_path / "wh", folder, prompts, hidden_states="all", segment_rows=300)
    model: Any = getattr(transformers, family.model).from_pretrained(folder).eval()
    layers = connection.execute("select layer, module from layers order by layer").fetchall()
    assert len(layers) >= 2
    for layer, module in layers:
        block = model.get_submodule(module.rpartition(".")[0])
        router = getattr(block, "gate", None) or block.router
        with torch.inference_mode():
            _, weights_TK, ids_TK = router(vectors_of(connection, "hidden_states", "vector", layer))
        expected = [
            dict(zip(ids, weights, strict=True))
            for ids, weights in zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)
        ]
        stored: dict[int, dict[int, float]] = {}
        for token, expert, weight in connection.execute(
            f"select token_id, expert, weight from routing where layer = {layer} order by token_id"
        ).fetchall():
            stored.setdefault(token, {})[expert] = weight
        assert [set(pairs) for pairs in stored.values()] == [set(pairs) for pairs in expected]
        for real, again in zip(stored.values(), expected, strict=True):
            assert all(abs(real[expert] - again[expert]) <= 1e-6 for expert in real)


def test_logits_are_the_gates_own_products(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    connection = run(tmp_path / "wh", folder, prompts, hidden_states="0,2", router_logits=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert connection.execute("select distinct layer from hidden_states order by layer").fetchall() == [(0,), (2,)]
    assert connection.execute("select distinct layer from router_logits order by layer").fetchall() == [
        (0,),
        (1,),
        (2,),
    ]
    for layer in (0, 2):
        hidden_TH = vectors_of(connection, "hidden_states", "vector", layer)
        logits_TE = vectors_of(connection, "router_logits", "logits", layer)
        assert logits_TE.shape == (len(hidden_TH), 8)
        expected_TE = hidden_TH @ model.model.layers[layer].mlp.gate.weight.detach().T
        assert torch.allclose(logits_TE, expected_TE, rtol=1e-5, atol=1e-5)
    top = connection.execute("""
        select count(*) from router_logits join routing using (run_id, segment, token_id, layer)
        where "rank" = 0 and logits[expert + 1] <> list_max(logits)
    """)
    assert top.fetchone() == (0,)


def test_opt_in_rows_are_those_of_the_tokens_in_order(tmp_path: Path, prompts: Path) -> None:
    connection = run(tmp_path / "wh", save_model(tmp_path / "model"), prompts, router_logits=True, segment_rows=200)
    tokens = [row[0] for row in connection.execute("select token_id from tokens order by token_id").fetchall()]
    for path in sorted((tmp_path / "wh").glob("segments/run_id=model*/segment=*/router_logits.parquet")):
        keys = duckdb.execute("select layer, token_id from read_parquet(?)", [str(path)]).fetchall()
        assert keys == sorted(keys)
    stored = connection.execute("select layer, token_id from router_logits order by all").fetchall()
    assert stored == [(layer, token) for layer in range(3) for token in tokens]


def test_asking_for_vectors_changes_no_routing(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    run(tmp_path / "plain", folder, prompts, run_id="same")
    run(tmp_path / "more", folder, prompts, run_id="same", router_logits=True, hidden_states="all")
    plain, more = contents(tmp_path / "plain"), contents(tmp_path / "more")
    routing = [name for name in plain if name.endswith(("routing.parquet", "tokens.parquet"))]
    assert routing
    assert all(plain[name] == more[name] for name in routing)


def test_bfloat16_vectors_are_stored_exactly(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model", dtype=torch.bfloat16)
    connection = run(tmp_path / "wh", folder, prompts, hidden_states="1")
    vectors = vectors_of(connection, "hidden_states", "vector", 1)
    assert torch.equal(vectors, vectors.bfloat16().float())
    assert np.isfinite(vectors.numpy()).all()


def test_cost_is_reported_before_the_run(tmp_path: Path, prompts: Path) -> None:
    notes: list[str] = []
    options = IngestOptions(
        model=str(save_model(tmp_path / "model")), prompts=(str(prompts),), router_logits=True, hidden_states="1"
    )
    ingest(options, Layout(tmp_path / "wh"), Progress(note=notes.append))
    size = 4 * (3 * 8 + 32)
    assert notes == [f"router_logits and hidden_states take about {size} bytes per token before compression"]


@pytest.mark.parametrize("layers", ["7", "0,x", ",", "0,,1", "-1"])
def test_layers_that_are_none_are_refused(layers: str, tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    with pytest.raises(UsageError, match="They are 0,1,2"):
        run(tmp_path / "wh", folder, prompts, hidden_states=layers)
    assert not (tmp_path / "wh").exists()


def test_logits_of_a_router_that_gives_probabilities_are_refused(tmp_path: Path, prompts: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "gemma4")
    folder = tmp_path / "model"
    build(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(UsageError, match="return probabilities, not logits"):
        run(tmp_path / "wh", folder, prompts, router_logits=True)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("olmoe", lambda _: torch.zeros(8)),
        ("deepseek_v3", lambda block: block.gate.e_score_correction_bias),
        ("kolibri1", lambda _: None),  # added to the logit, not to the score
    ],
)
def test_selection_bias_is_what_the_choice_is_made_by(
    name: str, bias: Callable[[Any], torch.Tensor | None], tmp_path: Path, prompts: Path
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    folder = tmp_path / "model"
    model = build(family)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    connection = run(tmp_path / "wh", folder, prompts)
    layers = connection.execute("select layer, module, num_experts from layers order by layer").fetchall()
    for layer, module, experts in layers:
        expected = bias(model.get_submodule(module.rpartition(".")[0]))
        stored = connection.execute(
            f"select selection_bias from experts where layer = {layer} order by expert"
        ).fetchall()
        assert [row[0] for row in stored] == ([None] * experts if expected is None else expected.tolist())


def test_confidence_is_that_of_the_models_own_softmax(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    connection = run(tmp_path / "wh", folder, prompts, router_logits=True)
    for layer in range(3):
        probabilities_TE = vectors_of(connection, "router_logits", "logits", layer).double().softmax(-1)
        rows = connection.execute(
            f"select entropy, top_k_mass, margin from router_confidence where layer = {layer} order by token_id"
        ).fetchall()
        largest_TE = probabilities_TE.sort(-1, descending=True).values
        entropy_T = torch.distributions.Categorical(probabilities_TE).entropy() / np.log(2)
        expected_T3 = torch.stack([entropy_T, largest_TE[:, :3].sum(-1), largest_TE[:, 2] - largest_TE[:, 3]], dim=1)
        assert torch.allclose(torch.tensor(rows, dtype=torch.float64), expected_T3, rtol=1e-9, atol=1e-12)
