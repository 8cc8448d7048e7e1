"""A model that loops over some of its layers: each visit is a separate layer, numbered in execution order."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.ingest.families.configuration import visits
from moewh.ingest.model.layers import find_moe_layers
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build, present
from tests.support.models import byte_tokenizer
from tests.support.opened import viewed

LOOPING = next(family for family in FAMILIES if family.name == "inkling2_loop")
TEXT = "around and around"
ORDERS = {1: [0, 1, 2, 3], 2: [0, 1, 2, 1, 2, 3], 3: [0, 1, 2, 1, 2, 1, 2, 3]}
"""By passes over the layers 1 and 2: the layers in the order in which they run."""

if not present(LOOPING):
    pytest.skip(f"transformers {transformers.__version__} has no model that loops", allow_module_level=True)


@pytest.fixture
def moewh(tmp_path: Path) -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, [*arguments, "--warehouse", str(tmp_path / "wh")])


def saved(folder: Path, passes: int) -> Any:
    """Save a model with this many passes, and return it."""
    family = dataclasses.replace(LOOPING, changes={**LOOPING.changes, "loop_num_passes": passes})
    build(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return getattr(transformers, family.model).from_pretrained(folder).eval()


@torch.inference_mode()
def routers_seen(model: Any, input_ids: torch.Tensor) -> list[tuple[int, torch.Tensor, Any]]:
    """Every call of a router in one forward pass, in order: its layer in the model, its input and its output."""
    seen: list[tuple[int, torch.Tensor, Any]] = []

    def keep(layer: int) -> Callable[..., None]:
        return lambda _, args, output: seen.append((layer, args[0].reshape(-1, args[0].shape[-1]), output))

    for layer, module in enumerate(model.model.layers):
        module.mlp.gate.register_forward_hook(keep(layer))
    model(input_ids=input_ids, use_cache=False)
    return seen


def called(passes: int, generate: bool) -> str:
    """The run of a model with this many passes."""
    return f"{passes}-{'generation' if generate else 'prompts'}"


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each number of passes, called so, and the warehouse `wh` with two runs of each."""
    folder = tmp_path_factory.mktemp("loops")
    (folder / "p.txt").write_text(TEXT + "\n")
    for passes in ORDERS:
        saved(folder / str(passes), passes)
        for generate in (False, True):
            more = ["--router-logits", "--hidden-states", "all", *(["--generate", "5"] if generate else [])]
            where = ["--warehouse", str(folder / "wh"), "--run-id", called(passes, generate)]
            command = ["ingest", "--model", str(folder / str(passes)), "--prompts", str(folder / "p.txt"), *more]
            result = CliRunner().invoke(main, [*command, *where])
            assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("generate", [False, True], ids=["prompts", "generation"])
@pytest.mark.parametrize("passes", ORDERS)
def test_each_visit_has_the_rows_of_its_own_call(passes: int, generate: bool, ingested: Path) -> None:
    model = getattr(transformers, LOOPING.model).from_pretrained(ingested / str(passes)).eval()
    connection = viewed(Layout(ingested / "wh"))
    run = f"run_id = '{called(passes, generate)}'"

    def fetch(sql: str) -> list[tuple[Any, ...]]:
        return connection.sql(sql).fetchall()

    assert fetch(f"select layer, module from layers where {run} order by layer") == [
        (visit, f"model.layers.{layer}.mlp.experts") for visit, layer in enumerate(ORDERS[passes])
    ]
    assert fetch(f"select num_hidden_layers, num_moe_layers from runs where {run}") == [(len(ORDERS[passes]),) * 2]

    ids = [token for (token,) in fetch(f"select vocab_id from tokens where {run} order by token_id")]
    seen = routers_seen(model, torch.tensor([ids]))
    assert [layer for layer, _, _ in seen] == ORDERS[passes]
    for visit, (_, hidden_TH, (logits_TE, weights_TK, ids_TK)) in enumerate(seen):
        stored = fetch(f"select list(expert order by expert), list(weight order by expert) from routing "
                       f"where {run} and layer = {visit} group by token_id order by token_id")  # fmt: skip
        of_token = zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)
        expected = [sorted(zip(experts, weights, strict=True)) for experts, weights in of_token]
        expected = expected[: len(stored)]  # the last generated token is not fed to the model
        assert len(stored) >= len(TEXT)
        assert [row[0] for row in stored] == [[expert for expert, _ in pairs] for pairs in expected]
        assert_close([row[1] for row in stored], [[weight for _, weight in pairs] for pairs in expected])
        for table, column, right in (("router_logits", "logits", logits_TE), ("hidden_states", "vector", hidden_TH)):
            found = fetch(f"select {column} from {table} where {run} and layer = {visit} order by token_id")
            assert_close([row[0] for row in found], right[: len(stored)].tolist())


def test_runs_of_models_that_loop_are_whole(ingested: Path, tmp_path: Path, moewh: Callable[..., Result]) -> None:
    shutil.copytree(ingested / "wh", tmp_path / "wh")
    assert moewh("verify").exit_code == 0
    for passes in ORDERS:
        for generate in (False, True):
            run = ["--run-id", called(passes, generate)]
            measured = moewh("geometry", "--model", str(ingested / str(passes)), *run)
            assert measured.exit_code == 0, measured.output
    assert moewh("check").exit_code == 0


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("claimed", [1, 2, 4])
def test_another_number_of_passes_than_promised_is_refused_by_name(
    claimed: int, ingested: Path, tmp_path: Path, moewh: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:

    def claim(config: Any, layer: int) -> list[int]:
        config = type(config)(**{**config.to_dict(), "loop_num_passes": claimed})
        return visits(config, layer)

    monkeypatch.setattr("moewh.ingest.model.layers.visits", claim)
    monkeypatch.setattr("moewh.ingest.families.configuration.visits", claim)
    result = moewh("ingest", "--model", str(ingested / "3"), "--prompts", str(ingested / "p.txt"))
    assert result.exit_code == 1
    assert "model.layers.1.mlp.experts" in result.stderr
    assert "in one forward pass" in result.stderr or "not called in a forward pass" in result.stderr
    assert not (tmp_path / "wh").exists()


def test_inspect_says_that_layers_run_more_than_once(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", 3)
    assert [moe.visit for moe in find_moe_layers(model, model.config).moe_layers] == [0, 0, 0, 1, 1, 2, 2, 0]
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "model")]).stdout
    assert "0-7, visits of 4 modules" in shown
