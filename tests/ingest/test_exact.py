"""Exactness: every stored row against the model's own arithmetic, redone in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch

from moewh.ingest.options import IngestOptions
from moewh.ingest.run import ingest
from moewh.warehouse.files.layout import Layout
from tests.support.models import DEVICE, MAX_LENGTH, byte_tokenizer, save_model
from tests.support.opened import viewed

KINDS = ("olmoe", "olmoe-normalised", "mixtral")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXTS = (
    ("a", "prose"),
    ("def f(x):\n    return x + 1", "code"),
    ("The quick brown fox jumps over the lazy dog, twice.", "prose"),
    ("12 + 30 = 42", None),
    ("Z" * (MAX_LENGTH - 1), "code"),
    ("ünïcödé → 漢字", "prose"),
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "ragged.jsonl"
    path.write_text("".join(json.dumps({"text": text, "domain": domain}) + "\n" for text, domain in TEXTS))
    return path


def ingested(
    folder: Path, model: Path, prompts: Path, **options: Any
) -> tuple[duckdb.DuckDBPyConnection, dict[tuple[int, int, int], list[tuple[int, float]]]]:
    """Ingest and return the warehouse with {(prompt, position, layer): [(expert, weight) by rank]}."""
    layout = Layout(folder)
    ingest(IngestOptions(model=str(model), prompts=(str(prompts),), **options), layout)
    connection = viewed(layout)
    rows = connection.sql("""
        select prompt_id, position, layer, expert, weight
        from routes
        order by prompt_id, position, layer, rank
    """).fetchall()
    routing: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    for prompt, position, layer, expert, weight in rows:
        routing.setdefault((prompt, position, layer), []).append((expert, weight))
    return connection, routing


def hidden_states(model: Any, blocks: list[Any], input_ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Return the input of each MoE block: [B, S, H] per layer."""
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for block in blocks]
    with torch.inference_mode():
        model.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def route(kind: str, gate: torch.Tensor, hidden_TH: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The published routing of OLMoE and Mixtral: softmax over all experts, top-k, renormalised or not."""
    probabilities_TE = torch.softmax(hidden_TH @ gate.T, dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = torch.topk(probabilities_TE, K, dim=-1)
    if kind != "olmoe":
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return ids_TK, weights_TK if kind == "mixtral" else weights_TK.to(hidden_TH.dtype)


@torch.inference_mode()
def weighted_experts(experts: Any, x_H: torch.Tensor, pairs: list[tuple[int, float]]) -> torch.Tensor:
    """Σ weight · down(silu(gate(x)) · up(x)), from the experts' own matrices."""
    total_H = torch.zeros_like(x_H, dtype=torch.float64)
    for expert, weight in pairs:
        gate_I, up_I = (experts.gate_up_proj[expert] @ x_H).chunk(2)
        total_H += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate_I) * up_I)).double()
    return total_H


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_equals_an_independent_computation(kind: str, dtype: str, tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model", kind, DTYPES[dtype])
    _, routing = ingested(tmp_path / "wh", folder, prompts)

    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    model.to(DEVICE).eval()
    blocks = [layer.mlp for layer in model.model.layers]
    # The same right-padded batch that the ingest forms: all prompts fit one budget, longest first.
    ids = [byte_tokenizer()(text)["input_ids"] for text, _ in TEXTS]
    order = sorted(range(len(ids)), key=lambda place: (-len(ids[place]), place))
    longest = len(ids[order[0]])
    input_ids = torch.tensor([ids[place] + [0] * (longest - len(ids[place])) for place in order], device=DEVICE)
    mask = torch.tensor([[1] * len(ids[place]) + [0] * (longest - len(ids[place])) for place in order], device=DEVICE)

    expected: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    for layer, hidden_BSH in enumerate(hidden_states(model, blocks, input_ids, mask)):
        flat_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        with torch.inference_mode():
            ids_TK, weights_TK = route(kind, blocks[layer].gate.weight, flat_TH, K=3)
        for row, (experts, weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
            place, position = order[row // longest], row % longest
            if position < len(ids[place]):
                pairs = sorted(zip(experts, weights, strict=True), key=lambda pair: (-pair[1], pair[0]))
                expected[place, position, layer] = pairs
    assert routing == expected


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_experts_rebuild_the_block(kind: str, tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model", kind)
    _, routing = ingested(tmp_path / "wh", folder, prompts)

    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.to(DEVICE).eval()
    worst = 0.0
    for prompt, (text, _) in enumerate(TEXTS):
        input_ids = torch.tensor([byte_tokenizer()(text)["input_ids"]], device=DEVICE)
        blocks = [layer.mlp for layer in model.model.layers]
        inputs = hidden_states(model, blocks, input_ids, torch.ones_like(input_ids))
        for layer, block in enumerate(blocks):
            with torch.inference_mode():
                actual_TH = block(inputs[layer])[0].double()
            for position, actual_H in enumerate(actual_TH):
                pairs = routing[prompt, position, layer]
                rebuilt_H = weighted_experts(block.experts, inputs[layer][0, position], pairs)
                worst = max(worst, float((rebuilt_H - actual_H).norm() / actual_H.norm()))
    assert worst < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_prompt_by_prompt(kind: str, tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model", kind)
    _, batched = ingested(tmp_path / "batched", folder, prompts, batch_tokens=4096)
    _, alone = ingested(tmp_path / "alone", folder, prompts, batch_tokens=1)
    assert batched.keys() == alone.keys()
    for key, pairs in batched.items():
        assert dict(pairs).keys() == dict(alone[key]).keys(), key
        others = dict(alone[key])
        assert max(abs(weight - others[expert]) for expert, weight in pairs) <= 1e-6


def test_padding_has_no_rows_and_tokens_are_the_tokenizers(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    connection, routing = ingested(tmp_path / "wh", folder, prompts)
    expected = {
        (prompt, position): token
        for prompt, (text, _) in enumerate(TEXTS)
        for position, token in enumerate(byte_tokenizer()(text)["input_ids"])
    }
    stored = connection.sql("select prompt_id, position, vocab_id, token_id, kind, token from tokens").fetchall()
    assert {(prompt, position): token for prompt, position, token, *_ in stored} == expected
    assert {key[:2] for key in routing} == set(expected)
    assert all(token_id == prompt * 2**24 + position for prompt, position, _, token_id, *_ in stored)
    assert all((kind == "special") == (position == 0) for _, position, _, _, kind, _ in stored)
    spelled = "".join(row[5] for row in sorted(stored) if row[0] == 1 and row[4] == "prompt")
    assert spelled == TEXTS[1][0]


def test_layers_say_what_was_measured(tmp_path: Path, prompts: Path) -> None:
    facts = {"olmoe": ("softmax", False), "olmoe-normalised": ("softmax", True), "mixtral": ("softmax", True)}
    for kind, expected in facts.items():
        connection, _ = ingested(tmp_path / kind, save_model(tmp_path / f"{kind}-model", kind), prompts)
        rows = connection.sql("""
            select layer, scoring, renormalized, top_k, num_experts, module, router_input, post_scale from layers
            order by layer
        """).fetchall()
        assert rows == [
            (layer, *expected, 3, 8, f"model.layers.{layer}.mlp.experts", "experts", 1.0) for layer in range(3)
        ]
        assert connection.execute("select count(*) from experts").fetchone() == (24,)


def test_invalid_numbers_have_no_rows_and_mark_the_prompt(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")

    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[byte_tokenizer()("Z")["input_ids"][1]] = np.nan
    model.save_pretrained(folder)
    connection, routing = ingested(tmp_path / "wh", folder, prompts)
    status = dict(connection.sql("select prompt_id, status from prompts").fetchall())
    assert status == {0: "ok", 1: "ok", 2: "ok", 3: "ok", 4: "failed", 5: "ok"}
    assert {prompt for prompt, _, _ in routing} == {0, 1, 2, 3, 5}
    assert connection.execute("select count(*) from routing where not isfinite(weight)").fetchone() == (0,)
