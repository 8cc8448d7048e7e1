"""Traces that look right and are not what they are named to be: each is read as it is meant, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moewh.warehouse.files.layout import Layout
from tests.support.imports import require_refused, run_import
from tests.support.models import byte_tokenizer
from tests.support.opened import viewed
from tests.support.traces import (
    COUNT_WRITERS,
    EXPERTS,
    HIDDEN,
    MOE,
    TOP_K,
    VOCABULARY,
    WRITERS,
    config,
    expected,
    gguf,
    lines,
    recorder_dump,
    rows_of,
    traced,
    write_flame,
)

TRACE = traced()
ONE = TRACE[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config(tmp_path_factory.mktemp("models") / "tiny-v3")


def flame(folder: Path, seed: int = 0) -> list[Path]:
    """Two files of samples, then two layers."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((40, len(MOE), EXPERTS)), -1)[..., :TOP_K]
    folder.mkdir(exist_ok=True)
    return write_flame(folder, rng.integers(1, VOCABULARY, 40), experts, rng.random(experts.shape).astype(np.float16))


# ------------------------------------------------------------------------------------------ flame-moe


def joined(layout: Layout) -> list[Any]:
    asked = "select t.vocab_id, r.layer, r.expert, r.weight from tokens t join routing r using (token_id) order by all"
    with viewed(layout) as connection:
        return connection.execute(asked).fetchall()


def test_samples_are_in_order_of_their_numbers(model: Path, tmp_path: Path) -> None:
    """However they are named on the command line: their rows are matched with those of the layers."""
    files = flame(tmp_path / "in")
    for number in (0, 1):  # without leading zeros, 10 follows 9
        files[number] = files[number].rename(files[number].with_name(f"{9 + number}.parquet"))
    for root, given in (("a", files), ("b", files[::-1]), ("c", [tmp_path / "in"])):
        assert run_import("flame-moe", given, model, tmp_path / root).exit_code == 0
    found = [joined(Layout(tmp_path / root / "wh")) for root in "abc"]
    assert found[0] == found[1] == found[2] != []


@pytest.mark.parametrize("other", [1, 3])
def test_files_of_two_captures_are_refused(other: int, model: Path, tmp_path: Path) -> None:
    files, others = flame(tmp_path / "iter_0001"), flame(tmp_path / "iter_0002", 1)
    files[other] = others[other]
    result = run_import("flame-moe", files, model, tmp_path)
    require_refused(result, f"Give the {'samples' if other == 1 else 'layers'} of one capture", tmp_path)


# ------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    "weights, said",
    [
        ([[0.6, 0.4], [0.5, 0.5]], "names an expert twice"),
        ([[0.0, 0.4], [0.5, 0.5]], "names an expert twice"),
        ([[0.0, 0.0], [0.5, 0.5]], None),
        ([[float("nan"), float("nan")], [0.5, 0.5]], None),
        ([[0.0, 0.0], [0.5, float("nan")]], "not a finite number"),
    ],
)
@pytest.mark.parametrize("missing", [0, -1])
def test_row_without_a_route_has_no_weights(
    weights: list[list[float]], said: str | None, missing: int, model: Path, tmp_path: Path
) -> None:
    """Two zeros with weights are a damaged row; what stands beside a row that was not captured means nothing."""
    files = lines(tmp_path / "a.jsonl", [{"expert_ids": [[[missing] * 2, [1, 2]]], "weights": [weights]}])
    result = run_import("plain", files, model, tmp_path)
    if said is None or (missing < 0 and "twice" in said):
        assert result.exit_code == 0, result.output
        assert rows_of(Layout(tmp_path / "wh")) == [(0, 0, 2, 0, 1, 0.5), (0, 0, 2, 1, 2, 0.5)]
    else:
        require_refused(result, said, tmp_path)


def test_more_experts_than_the_model_has_per_token(model: Path, tmp_path: Path) -> None:
    """The recorder has 8 places; all that are filled belong to the route, but for a fused shared expert."""
    for name, beyond in (("shared", EXPERTS), ("routed", EXPERTS - 1)):
        dump = recorder_dump(TRACE)
        dump["records"][0]["topk_ids_of_layer"][1:, :, TOP_K] = beyond
        torch.save(dump, tmp_path / f"{name}.pt")
    assert run_import("sglang-recorder", [tmp_path / "shared.pt"], model, tmp_path / "a").exit_code == 0
    assert rows_of(Layout(tmp_path / "a" / "wh")) == expected(TRACE)
    result = run_import("sglang-recorder", [tmp_path / "routed.pt"], model, tmp_path)
    require_refused(result, f"more than {TOP_K} experts per token", tmp_path)


# ------------------------------------------------------------------------------------------ token ids


@pytest.mark.parametrize(
    "tokens", [torch.ones(10).bfloat16(), torch.ones(10).to_sparse(), torch.ones(10, device="meta"), torch.ones(10)]
)
def test_tensors_that_are_no_ids_are_refused(tokens: torch.Tensor, model: Path, tmp_path: Path) -> None:
    sample = {"tokens": tokens, "response_length": 1, "rollout_routed_experts": ONE.hidden_RLK}
    torch.save({"rollout_id": 1, "samples": [sample]}, tmp_path / "a.pt")
    require_refused(run_import("slime", [tmp_path / "a.pt"], model, tmp_path), "its token ids are not", tmp_path)


def test_an_empty_answer_is_no_floats(model: Path, tmp_path: Path) -> None:
    """numpy saves an empty list as floats."""
    parts = {"routed_experts": ONE.hidden_RLK, "prompt_token_ids": ONE.ids_T, "token_ids": []}
    arrays: dict[str, Any] = {f"0/{name}": np.array(part) for name, part in parts.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    assert run_import("vllm", [tmp_path / "a.npz"], model, tmp_path).exit_code == 0
    assert rows_of(Layout(tmp_path / "wh")) == expected([ONE])


@pytest.mark.parametrize("case", ["vllm", "plain", "verl"])
def test_a_tokenizer_of_another_model_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    """It would give its own texts to some ids, and none to the rest."""
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    small.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    form, write = WRITERS[case]
    files: list[Any] = write(tmp_path, TRACE)
    result = run_import(form, [*files, "--tokenizer", tmp_path / "small"], model, tmp_path)
    require_refused(result, "the tokenizer has no token", tmp_path)
    assert run_import(form, [*files, "--tokenizer", tmp_path / "large"], model, tmp_path).exit_code == 0


# ------------------------------------------------------------------------------------------ counts


def stat(folder: Path, counts: torch.Tensor) -> Path:
    torch.save({"rank": 0, "logical_count": counts}, folder / "stat.pt")
    return folder / "stat.pt"


def imatrix(folder: Path, count: float) -> Path:
    tensors = {f"blk.{layer}.ffn_gate_exps.weight.counts": np.full(EXPERTS, count) for layer in MOE}
    (folder / "imatrix.gguf").write_bytes(gguf({"general.type": "imatrix"}, tensors))
    return folder / "imatrix.gguf"


@pytest.mark.parametrize("count", [2.0**62, 1e30])
def test_counts_that_overflow_are_refused(count: float, model: Path, tmp_path: Path) -> None:
    result = run_import("llama-imatrix", [imatrix(tmp_path, count)], model, tmp_path)
    require_refused(result, "its counts add up to more than", tmp_path)


def test_steps_that_overflow_are_refused(model: Path, tmp_path: Path) -> None:
    """Four times 2**62 is 0 in 64 bits."""
    steps = torch.zeros(4, HIDDEN, EXPERTS, dtype=torch.int64)
    steps[:, list(MOE)] = 2**62
    result = run_import("sglang-stat", [stat(tmp_path, steps)], model, tmp_path)
    require_refused(result, "its counts add up to more than", tmp_path)


def test_a_step_below_zero_is_refused(model: Path, tmp_path: Path) -> None:
    """Another step would make up for it."""
    steps = torch.zeros(2, HIDDEN, EXPERTS, dtype=torch.int32)
    steps[0, 1], steps[1, 1] = -1, 5
    result = run_import("sglang-stat", [stat(tmp_path, steps)], model, tmp_path)
    require_refused(result, "not whole numbers from 0 in every step", tmp_path)


@pytest.mark.parametrize("form", sorted(COUNT_WRITERS))
def test_a_layer_without_counts_is_refused(form: str, model: Path, tmp_path: Path) -> None:
    """The file of one pipeline rank: all experts of the other ranks' layers would be dead."""
    counts_LE = np.arange(len(MOE) * EXPERTS).reshape(len(MOE), EXPERTS)
    counts_LE[-1] = 0
    result = run_import(form, COUNT_WRITERS[form](tmp_path, counts_LE), model, tmp_path)
    require_refused(result, f"every count of layer {MOE[-1]} is 0, so it was not recorded", tmp_path)


def test_the_layers_of_two_ranks_are_joined(model: Path, tmp_path: Path) -> None:
    (folder,) = COUNT_WRITERS["tensorrt-llm"](tmp_path, np.ones((len(MOE), EXPERTS), np.int64))
    counts_LE = np.arange(len(MOE) * EXPERTS, dtype=np.int32).reshape(len(MOE), EXPERTS)
    for rank, layer in enumerate(MOE):
        save_file({f"100_{layer}": counts_LE[rank]}, folder / f"rank{rank}.safetensors")
    assert run_import("tensorrt-llm", [folder], model, tmp_path).exit_code == 0
    with viewed(Layout(tmp_path / "wh")) as connection:
        found = connection.execute("select tokens from expert_load order by layer, expert").fetchall()
    assert [tokens for (tokens,) in found] == counts_LE.ravel().tolist()


def test_the_same_counts_of_two_ranks_are_refused(model: Path, tmp_path: Path) -> None:
    """Ranks that share a batch count the same tokens; their files differ in the rank alone."""
    steps = np.arange(HIDDEN * EXPERTS).reshape(1, HIDDEN, EXPERTS)
    steps[:, 0] = 0
    for rank in range(2):
        torch.save({"rank": rank, "logical_count": torch.tensor(steps)}, tmp_path / f"{rank}.pt")
    result = run_import("sglang-stat", [tmp_path / "0.pt", tmp_path / "1.pt"], model, tmp_path)
    require_refused(result, "1.pt: holds the counts of", tmp_path)


@pytest.mark.parametrize("form", sorted(COUNT_WRITERS))
def test_counts_are_exact(form: str, model: Path, tmp_path: Path) -> None:
    counts_LE = np.arange(len(MOE) * EXPERTS).reshape(len(MOE), EXPERTS) + (1 << 22)
    assert run_import(form, COUNT_WRITERS[form](tmp_path, counts_LE), model, tmp_path).exit_code == 0
    with viewed(Layout(tmp_path / "wh")) as connection:
        found = connection.execute("select layer, expert, tokens from expert_load order by all").fetchall()
    assert found == [
        (layer, expert, int(counts_LE[n, expert])) for n, layer in enumerate(MOE) for expert in range(EXPERTS)
    ]
