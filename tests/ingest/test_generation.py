"""Generation: the routing of generated tokens equals a plain forward pass over the same tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
import transformers

from moewh.ingest.capture.generation import generate_batch
from moewh.ingest.options import IngestOptions
from moewh.ingest.run import ingest
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build
from tests.support.models import byte_tokenizer, save_model
from tests.support.opened import viewed
from tests.support.runs import contents

TEXTS = ("one", "two", "a longer prompt", "", "x", "and\nfour")
NEW = 9


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("prompts") / "p.jsonl", [{"text": text} for text in TEXTS])


def run(warehouse: Path, model: Path, prompts: Path, **options: Any) -> duckdb.DuckDBPyConnection:
    ingest(IngestOptions(model=str(model), prompts=(str(prompts),), **options), Layout(warehouse))
    return viewed(Layout(warehouse))


def spoken(connection: duckdb.DuckDBPyConnection) -> dict[int, list[tuple[int, str]]]:
    """{prompt: [(token, kind) by position]}"""
    rows = connection.execute("select prompt_id, vocab_id, kind from tokens order by prompt_id, position").fetchall()
    said: dict[int, list[tuple[int, str]]] = {}
    for prompt, token, kind in rows:
        said.setdefault(prompt, []).append((token, kind))
    return said


def routing(connection: duckdb.DuckDBPyConnection) -> dict[tuple[int, int, int], dict[int, float]]:
    """{(prompt, position, layer): {expert: weight}}"""
    rows = connection.execute("select prompt_id, position, layer, expert, weight from routes").fetchall()
    found: dict[tuple[int, int, int], dict[int, float]] = {}
    for prompt, position, layer, expert, weight in rows:
        found.setdefault((prompt, position, layer), {})[expert] = weight
    return found


def save_family(folder: Path, name: str) -> Path:
    build(next(family for family in FAMILIES if family.name == name)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_generated_rows_equal_a_teacher_forced_pass(name: str, tmp_path: Path, prompts: Path) -> None:
    folder = save_family(tmp_path / "model", name)
    connection = run(tmp_path / "generated", folder, prompts, generate=NEW)
    said = spoken(connection)
    assert Counter(len(tokens) for tokens in said.values()).keys() >= {2 + NEW, 4 + NEW}
    # The last token was never fed to the model; all others are fed at once here.
    forced = write(
        tmp_path / "forced.jsonl",
        [{"input_ids": [token for token, _ in said.get(n, [(0, "")])][:-1]} for n in range(6)],
    )
    expected = routing(run(tmp_path / "forced", folder, forced))
    real = routing(connection)
    assert real.keys() == expected.keys()
    for key, pairs in real.items():
        assert pairs.keys() == expected[key].keys(), key
        assert all(abs(weight - expected[key][expert]) <= 1e-6 for expert, weight in pairs.items())


def test_encoder_decoder_prompt_in_the_encoder_and_speech_in_the_decoder(tmp_path: Path, prompts: Path) -> None:
    folder = save_family(tmp_path / "model", "switch_transformers")
    connection = run(tmp_path / "wh", folder, prompts, generate=4)
    stacks = dict(connection.execute("select layer, stack from layers").fetchall())
    assert set(stacks.values()) == {"encoder", "decoder"}
    model: Any = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(folder).eval()
    found = routing(connection)
    for prompt, tokens in spoken(connection).items():
        ids = byte_tokenizer()(TEXTS[prompt])["input_ids"]
        said = [token for token, _ in tokens[len(ids) :]]
        assert [token for token, _ in tokens[: len(ids)]] == ids
        assert said[0] == model.config.pad_token_id  # where T5 and similar models start
        assert [kind for _, kind in tokens[len(ids) :]] == ["special"] + ["generated"] * (len(said) - 1)
        expected = decoder_routing(model, ids, said[:-1])
        for layer, stack in stacks.items():
            at = {position for owner, position, where in found if (owner, where) == (prompt, layer)}
            if stack == "encoder":
                assert at <= set(range(len(ids)))
                continue
            assert at == {len(ids) + place for place in range(len(said) - 1)}
            for place, (expert, weight) in enumerate(expected[layer]):
                real = found[prompt, len(ids) + place, layer]
                assert real.keys() == {expert}
                # With a cache and without, products are summed in another order.
                assert abs(real[expert] - weight) <= 1e-5


def decoder_routing(model: Any, ids: list[int], fed: list[int]) -> dict[int, list[tuple[int, float]]]:
    """{layer: [(expert, weight) of each token fed]}, one token at a time so that no capacity is exceeded."""
    chosen: dict[int, list[tuple[int, float]]] = {}
    first = len(model.encoder.block)
    handles = []
    for number, block in enumerate(model.decoder.block):
        mlp = block.layer[-1].mlp
        if hasattr(mlp, "router"):

            def after(router: Any, args: Any, _: Any, layer: int = first + number) -> None:
                probabilities_E = torch.softmax(router.classifier(args[0][0, -1]), -1)
                weight, expert = probabilities_E.max(-1)
                chosen.setdefault(layer, []).append((int(expert), float(weight)))

            handles.append(mlp.router.register_forward_hook(after))
    with torch.inference_mode():
        for count in range(1, len(fed) + 1):
            model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([fed[:count]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return chosen


def test_tokens_are_what_the_model_says_greedily(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    said = spoken(run(tmp_path / "wh", folder, prompts, generate=NEW))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, text in enumerate(TEXTS):
        if not text:
            assert prompt not in said
            continue
        ids = byte_tokenizer()(text)["input_ids"]
        tokens = list(ids)
        for _ in range(NEW):
            with torch.inference_mode():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 0:
                break
        kinds = ["special"] + ["prompt"] * (len(ids) - 1) + ["generated"] * (len(tokens) - len(ids))
        assert said[prompt] == list(zip(tokens, kinds, strict=True))


def test_rows_stop_where_a_sequence_ends(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    endless = spoken(run(tmp_path / "endless", folder, prompts, generate=NEW))
    new = {prompt: [token for token, kind in tokens if kind == "generated"] for prompt, tokens in endless.items()}
    # End the sequences at a token that some generate in the middle: a ragged batch.
    middle = Counter(token for tokens in new.values() for token in tokens[1:-1]).most_common(1)[0][0]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = middle
    model.save_pretrained(folder)
    connection = run(tmp_path / "ended", folder, prompts, generate=NEW)
    lengths = set()
    positions = {key[:2] for key in routing(connection)}
    for prompt, tokens in spoken(connection).items():
        said = [token for token, kind in tokens if kind == "generated"]
        full = new[prompt]
        assert said == (full[: full.index(middle) + 1] if middle in full else full)
        assert {position for owner, position in positions if owner == prompt} == set(range(len(tokens) - 1))
        lengths.add(len(said))
    assert len(lengths) > 1


def test_sampling_is_decided_by_seed_and_prompt_alone(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    options = {"generate": NEW, "temperature": 1.5}
    first = spoken(run(tmp_path / "a", folder, prompts, **options))
    assert spoken(run(tmp_path / "b", folder, prompts, batch_tokens=1, **options)) == first
    assert spoken(run(tmp_path / "c", folder, prompts, seed=1, **options)) != first
    assert spoken(run(tmp_path / "d", folder, prompts, generate=NEW)) != first


def test_samples_follow_the_models_distribution(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", initializer_range=0.1)
    path = write(tmp_path / "p.jsonl", [{"input_ids": [5, 9]}] * 2_000)
    connection = run(tmp_path / "wh", folder, path, generate=1, temperature=0.7)
    counts = np.zeros(257)
    for token, number in connection.execute(
        "select vocab_id, count(*) from tokens where kind = 'generated' group by vocab_id"
    ).fetchall():
        counts[token] = number
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = torch.softmax(model(input_ids=torch.tensor([[5, 9]])).logits[0, -1] / 0.7, -1).numpy() * 2_000
    # Pearson's statistic has mean 256 and standard deviation 22.6 if the samples follow `expected`.
    assert ((counts - expected) ** 2 / expected).sum() < 256 + 5 * 22.6


def test_same_command_gives_the_same_bytes_and_is_resumed(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    for name in ("a", "b"):
        run(tmp_path / name, folder, prompts, generate=NEW, segment_rows=300)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("segments/run_id=model*/segment=*"))) > 2


def test_memory_that_runs_out_gives_the_same_rows(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    whole = routing(run(tmp_path / "whole", folder, prompts, generate=NEW))
    real = generate_batch

    def short(loaded: Any, segment: Any, contexts: Any, *rest: Any) -> Any:
        if len(contexts) > 1:
            raise torch.OutOfMemoryError("simulated")
        return real(loaded, segment, contexts, *rest)

    monkeypatch.setattr("moewh.ingest.capture.forward.generate_batch", short)
    parts = routing(run(tmp_path / "parts", folder, prompts, generate=NEW))
    assert {key: set(pairs) for key, pairs in parts.items()} == {key: set(pairs) for key, pairs in whole.items()}


def test_generated_tokens_have_vectors_and_count_in_views(tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    connection = run(tmp_path / "wh", folder, prompts, generate=3, hidden_states="1", router_logits=True)
    fed = connection.execute("select count(distinct token_id) from routing").fetchone()
    for table in ("hidden_states", "router_logits"):
        assert connection.execute(f"select count(distinct token_id) from {table}").fetchone() == fed
    counted = connection.execute("select sum(first_choice_tokens) from expert_load where layer = 0").fetchone()
    kinds = connection.execute(
        "select count(*) from routes where layer = 0 and \"rank\" = 0 and kind <> 'special'"
    ).fetchone()
    assert counted == kinds
    assert connection.execute("select count(*) from tokens where kind = 'generated'").fetchone() == (15,)


def test_tokens_key_is_the_models_own_when_it_generates(tmp_path: Path, prompts: Path) -> None:
    for seed in (1, 2):
        folder = save_model(tmp_path / f"step{seed}", seed=seed)
        run(tmp_path / "wh", folder, prompts, generate=NEW)
        run(tmp_path / "wh", folder, prompts)
    keys = viewed(Layout(tmp_path / "wh")).execute("select tokens_key from runs").fetchall()
    assert sorted(Counter(keys).values()) == [1, 1, 2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"generate": 5, "on_overflow": "chunk"}, "--generate needs a prompt in one piece"),
        ({"generate": 60, "max_length": 30}, "give at most 4"),
        ({"generate": 64}, "--generate 64 leaves no room for a prompt .*: give at most 63"),
        ({"generate": -1}, "--generate is -1. Give a whole number of at least 0"),
        ({"temperature": -0.5}, "--temperature is -0.5. Give a finite number of at least 0"),
    ],
)
def test_wrong_use(options: dict[str, Any], says: str, tmp_path: Path, prompts: Path) -> None:
    folder = save_model(tmp_path / "model")
    with pytest.raises(UsageError, match=says):
        run(tmp_path / "wh", folder, prompts, **options)
    assert not (tmp_path / "wh").exists()
