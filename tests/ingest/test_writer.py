"""`moewh.Writer`: rows from any source, exactly as given; a run that is open until it is closed; refusals."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import moewh
from moewh.cli.main import main
from moewh.ingest.options import command_words
from moewh.ingest.record import Identity
from moewh.ingest.recorder import open_run
from moewh.ingest.recorder.sequences import Block, Joined, join
from moewh.ingest.write.segment import Committed, write_segment
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.runs import delete_run
from moewh.warehouse.sealing.seal import unseal
from moewh.warehouse.trust.repair import remedy
from tests.support.models import byte_tokenizer, save_model

SHAPE: dict[str, Any] = {"layers": [1, 3, 4], "num_experts": 6, "top_k": 2}
L, E, K = 3, 6, 2
Sequence = tuple[Any, Any, Any]


def sequences(count: int, seed: int = 0) -> list[Sequence]:
    """Random (token_ids [T], expert_ids [T, L, K], weights [T, L, K])."""
    rng = np.random.default_rng(seed)
    found = []
    for T in rng.integers(1, 9, count):
        chosen = rng.random((T, L, E)).argsort(-1)[..., :K]
        found.append((rng.integers(1, 200, T), chosen, rng.random((T, L, K)).astype(np.float32)))
    return found


def rows(warehouse: Path, columns: str = "token_id, layer, rank, expert, weight") -> list[tuple[Any, ...]]:
    return moewh.open(warehouse).sql(f"select {columns} from routing order by all").fetchall()


def expected_rows(given: list[Sequence]) -> list[tuple[Any, ...]]:
    """Return the expected rows: by descending weight, ties by expert."""
    found = []
    for prompt, (_, expert_TLK, weight_TLK) in enumerate(given):
        for position, (expert_LK, weight_LK) in enumerate(zip(expert_TLK, weight_TLK, strict=True)):
            for layer, experts, weights in zip(SHAPE["layers"], expert_LK.tolist(), weight_LK.tolist(), strict=True):
                pairs = sorted(zip(experts, weights, strict=True), key=lambda pair: (-pair[1], pair[0]))
                token_id = prompt * 2**24 + position
                found += [(token_id, layer, rank, *pair) for rank, pair in enumerate(pairs) if pair[0] >= 0]
    return sorted(found)


@pytest.mark.parametrize("segment_rows", [1, 60, 64_000_000])
def test_rows_are_those_given(segment_rows: int, tmp_path: Path) -> None:
    given = sequences(20)
    given[3][1][0, :] = -1  # a token without a route at any layer
    with moewh.Writer(tmp_path, "mine", "a-model", **SHAPE, segment_rows=segment_rows) as writer:
        for place, (token_ids, expert_ids, weights) in enumerate(given):
            assert writer.write(token_ids, expert_ids, weights, domain="ab"[place % 2]) == place
    assert rows(tmp_path) == expected_rows(given)
    warehouse = moewh.open(tmp_path)
    stored = warehouse.sql("select vocab_id from tokens order by token_id").fetchall()
    assert [row[0] for row in stored] == np.concatenate([ids for ids, _, _ in given]).tolist()
    domains = warehouse.sql("select domain from prompts order by prompt_id").fetchall()
    assert [row[0] for row in domains] == list("ab" * 10)
    segments = warehouse.sql("select count(*), max(segment) filter (where last) from segments").fetchall()[0]
    assert segments == {1: (20, 19), 60: (segments[0], segments[0] - 1), 64_000_000: (1, 0)}[segment_rows]
    assert segment_rows != 60 or 2 < segments[0] < 20
    assert warehouse.verify() == []
    assert warehouse.sql("select status, segments_planned from runs").fetchall() == [("complete", None)]


def test_tensors_are_taken_with_their_values(tmp_path: Path) -> None:
    """Also those of bfloat16 and of a graph, which numpy does not take."""
    import torch

    token_ids, expert_ids, weights = sequences(1)[0]
    half = torch.tensor(weights, dtype=torch.bfloat16, requires_grad=True)
    with moewh.Writer(tmp_path, "mine", "a-model", **SHAPE) as writer:
        writer.write(torch.tensor(token_ids), torch.tensor(expert_ids), half)
    assert rows(tmp_path) == expected_rows([(token_ids, expert_ids, half.detach().float().numpy())])


def test_each_sequence_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs does not grow with the sequences before it, and their passes are not kept."""
    joined: list[Block] = []

    def counting(block: Block) -> Joined:
        joined.append(block)
        return join(block)

    monkeypatch.setattr(open_run, "join", counting)
    given = sequences(30)
    with moewh.Writer(tmp_path, "mine", **SHAPE) as writer:
        for number, (token_ids, expert_ids, weights) in enumerate(given, 1):
            writer.write(token_ids, expert_ids, weights)
            assert len({id(block) for block in joined}) == len(joined) == number
    assert len(joined) == len(given)
    assert rows(tmp_path) == expected_rows(given)


def test_a_run_is_running_until_it_is_closed(tmp_path: Path) -> None:
    writer = moewh.Writer(tmp_path, "mine", "a-model", **SHAPE, segment_rows=30)

    def status() -> Any:
        return moewh.open(tmp_path).sql("select status, segments > 0 from runs").fetchall()[0]

    writer.write(*sequences(1)[0])
    assert status() == ("running", False)
    for sequence in sequences(9):
        writer.write(*sequence)
    assert status() == ("running", True)
    assert moewh.open(tmp_path).verify() == []
    writer.close()
    assert status() == ("complete", True)
    writer.close()  # does nothing
    with pytest.raises(UsageError, match="the writer is closed"):
        writer.write(*sequences(1)[0])


def test_an_exception_leaves_the_run_running_with_what_was_written(tmp_path: Path) -> None:
    given = sequences(5)
    with pytest.raises(RuntimeError, match="mine own"), moewh.Writer(tmp_path, "mine", "m", **SHAPE) as writer:
        for sequence in given:
            writer.write(*sequence)
        raise RuntimeError("mine own")
    assert moewh.open(tmp_path).sql("select status, prompts from runs").fetchall() == [("running", 5)]
    assert rows(tmp_path) == expected_rows(given)
    assert moewh.open(tmp_path).verify() == []


def test_after_a_segment_that_could_not_be_written_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that goes on after the error is told again, at the end at the latest, and the run is not complete."""
    given, real = sequences(12), write_segment

    def second_fails(layout: Layout, identity: Identity, number: int, *args: Any, **kwargs: Any) -> Committed:
        if number == 1:
            raise MoewhError("no room")
        return real(layout, identity, number, *args, **kwargs)

    monkeypatch.setattr(open_run, "write_segment", second_fails)
    writer = moewh.Writer(tmp_path, "mine", "m", **SHAPE, segment_rows=1)
    refused = []
    for place, sequence in enumerate(given):
        try:
            writer.write(*sequence)
        except MoewhError:
            refused.append(place)
    assert refused == [*range(refused[0], len(given))]
    with pytest.raises(MoewhError, match="no room"):
        writer.close()
    assert moewh.open(tmp_path).sql("select status, segments from runs").fetchall() == [("running", 1)]
    assert rows(tmp_path) == expected_rows(given[:1])


@pytest.mark.parametrize("again", ["begun twice", "deleted and begun again"])
def test_two_runs_of_one_name_are_not_mixed(again: str, tmp_path: Path) -> None:
    """One of two writers is refused, however the name came to be theirs both; the run has the other's rows alone."""
    first, second = sequences(6, seed=1), sequences(6, seed=2)
    old = moewh.Writer(tmp_path, "mine", "m", **SHAPE, segment_rows=1)
    if again == "deleted and begun again":
        for sequence in first[:3]:
            old.write(*sequence)
        delete_run(Layout(tmp_path), "mine")
    new = moewh.Writer(tmp_path, "mine", "m", **SHAPE, segment_rows=1)
    for sequence in second:
        new.write(*sequence)
    with pytest.raises(MoewhError, match=r"run 'mine' (is another run now|exists)"):
        for sequence in first[3:]:
            old.write(*sequence)
        old.close()
    new.close()
    assert rows(tmp_path) == expected_rows(second)


@pytest.mark.parametrize("step", ["join", "assemble", "write_segment"])
def test_an_interrupt_loses_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook, a cell that writes is stopped, and the next one goes on with the same writer."""
    given, real = sequences(6), getattr(open_run, step)

    def interrupted(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(open_run, step, real)
        raise KeyboardInterrupt

    writer = moewh.Writer(tmp_path, "mine", "m", **SHAPE, segment_rows=1)
    assert writer.write(*given[0]) == 0
    monkeypatch.setattr(open_run, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.write(*given[1])
    assert [writer.write(*sequence) for sequence in given[2:]] == [2, 3, 4, 5]
    writer.close()
    assert moewh.open(tmp_path).sql("select status, prompts from runs").fetchall() == [("complete", 6)]
    assert rows(tmp_path) == expected_rows(given)


@pytest.mark.parametrize("segment_rows", [40, 64_000_000])
def test_threads_may_share_a_writer(segment_rows: int, tmp_path: Path) -> None:
    """Such as those that wait for a server's answers; each gets the prompt_id of its own sequence."""
    given, interval = sequences(200), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        writer = moewh.Writer(tmp_path, "mine", "m", **SHAPE, segment_rows=segment_rows)
        with writer, ThreadPoolExecutor(8) as threads:
            prompts = list(threads.map(lambda sequence: writer.write(*sequence), given))
    finally:
        sys.setswitchinterval(interval)
    in_order = [sequence for _, sequence in sorted(zip(prompts, given, strict=True), key=lambda pair: pair[0])]
    assert sorted(prompts) == [*range(200)]
    assert rows(tmp_path) == expected_rows(in_order)


def test_a_segment_beyond_the_last_is_a_fault(tmp_path: Path) -> None:
    with moewh.Writer(tmp_path, "mine", "m", **SHAPE, segment_rows=1) as writer:
        for sequence in sequences(3):
            writer.write(*sequence)
    unseal(Layout(tmp_path), "mine")
    folder = tmp_path / "segments" / "run_id=mine"
    (folder / "segment=2").rename(folder / "segment=3")
    assert {fault.path.name for fault in moewh.open(tmp_path).verify()} == {"manifest.json"}
    assert moewh.open(tmp_path).sql("select status from runs").fetchall() == [("running",)]


def test_no_command_is_named_that_would_write_it_again(tmp_path: Path) -> None:
    with moewh.Writer(tmp_path, "mine", "m", **SHAPE) as writer:
        writer.write(*sequences(1)[0])
    (tmp_path / "segments" / "run_id=mine" / "segment=0" / "tokens.parquet").unlink()
    faults = moewh.open(tmp_path).verify()
    assert [fault.why for fault in faults] == ["is missing"]
    again = f"`moewh runs --delete mine --warehouse {tmp_path}`, then the Python code that wrote run mine"
    assert remedy(Layout(tmp_path), faults[0].folder, command_words) == again


def test_a_run_that_cannot_be_sealed_is_to_be_written_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), moewh.Writer(tmp_path, "mine", "m", **SHAPE, segment_rows=1) as writer:
        writer.write(*sequences(1)[0])
        raise KeyError
    refused = CliRunner().invoke(main, ["seal", "mine", "--warehouse", str(tmp_path)])
    assert refused.exit_code == 1
    again = f"`moewh runs --delete mine --warehouse {tmp_path}`, then the Python code that wrote run mine"
    assert refused.stderr == f"moewh: run mine is not complete. This completes and seals it: {again}\n"


def test_layers_and_experts_come_from_the_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral", num_hidden_layers=2)
    ids = np.tile(np.array([0, 5, 2]), (4, 2, 1))
    with moewh.Writer(tmp_path / "wh", "mine", str(folder), tokenizer=byte_tokenizer()) as writer:
        writer.write(byte_tokenizer()("abc")["input_ids"], ids, np.ones((4, 2, 3), np.float32), generated=1)
    warehouse = moewh.open(tmp_path / "wh")
    layers = warehouse.sql("select layer, module, num_experts, top_k, scoring from layers order by layer").fetchall()
    assert layers == [(layer, f"model.layers.{layer}.mlp.experts", 8, 3, "softmax") for layer in range(2)]
    known = "select distinct router_class, num_shared_experts, post_scale, router_input from layers"
    assert warehouse.sql(known).fetchall() == [("MixtralTopKRouter", 0, None, None)], "as an import of a trace has them"
    assert warehouse.sql("select count(*) from experts").fetchall()[0] == (16,)
    assert warehouse.sql("select token, kind from tokens order by token_id").fetchall() == [
        ("<s>", "special"),
        ("a", "prompt"),
        ("b", "prompt"),
        ("c", "generated"),
    ]
    assert warehouse.sql("select text from prompts").fetchall() == [("<s>ab",)]


_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"expert_ids": np.zeros((2, 2, 2), int)}, r"sequence 0: expert_ids are \[2, 2, 2\]. Give \[tokens, 3 "),
    "no tokens": ({"expert_ids": np.zeros((0, 3, 2), int)}, r"expert_ids are \[0, 3, 2\]"),
    "floats": ({"expert_ids": np.zeros((2, 3, 2))}, "expert_ids are of type float64. Give whole numbers"),
    "ragged": ({"expert_ids": [[1], [2, 3]]}, "expert_ids are not an array"),
    "too great": ({"expert_ids": np.full((2, 3, 2), 6)}, r"token 0 has experts \[6, 6\], and there are 0 to 5"),
    "negative": ({"expert_ids": np.full((2, 3, 2), -2)}, r"token 0 has experts \[-2, -2\]"),
    "half a route": ({"expert_ids": np.tile([1, -1], (2, 3, 1))}, r"experts \[1, -1\]. Give all of them, or -1 only"),
    "twice": ({"expert_ids": np.full((2, 3, 2), 5)}, r"token 0 has an expert twice: \[5, 5\]"),
    "weights' shape": ({"weights": np.ones((2, 3, 1), np.float32)}, r"weights are \[2, 3, 1\]"),
    "weights' type": ({"weights": np.ones((2, 3, 2), int)}, "weights are of type int64. Give floating-point"),
    "masked experts": (
        {"expert_ids": np.ma.masked_array(np.tile([1, 2], (2, 3, 1)), np.arange(12).reshape(2, 3, 2) > 9)},
        "expert_ids are masked in part",
    ),
    "masked tokens": (
        {"expert_ids": [np.ma.masked_array(np.tile([1, 2], (3, 1)), np.arange(6).reshape(3, 2) > 4)] * 2},
        "expert_ids are masked in part",
    ),
    "masked slots": (
        {"expert_ids": [[np.ma.masked_array([1, 2], [False, True])] * 3, [[1, 2]] * 3]},
        "expert_ids are masked in part",
    ),
    "masked weights": (
        {"weights": [np.ma.masked_array(np.full((3, 2), 0.5), np.arange(6).reshape(3, 2) > 4)] * 2},
        "weights are masked in part",
    ),
    "masked ids": ({"token_ids": np.ma.masked_array([1, 2], [False, True])}, "token_ids are masked in part"),
    "nan": ({"weights": np.full((2, 3, 2), np.nan)}, "which are not finite"),
    "token count": ({"token_ids": [1, 2, 3]}, r"token_ids are \[3\], and expert_ids have 2 tokens"),
    "token id": ({"token_ids": [1, -7]}, "-7 among its token_ids is not a token id"),
    "generated": ({"generated": 3}, "generated is 3 of 2 tokens"),
    "weights of turned axes": ({"weights": np.ones((2, 2, 3), np.float32)}, r"weights are \[2, 2, 3\], and expert_ids"),
    "flat weights": ({"weights": np.ones((6, 2), np.float32)}, r"weights are \[6, 2\], and expert_ids"),
    "no weights": ({"weights": np.zeros((2, 3, 2), np.float32)}, "every weight is 0. Give None"),
    "great weights": ({"weights": np.full((2, 3, 2), 1e300)}, "which are not finite"),
    "generated type": ({"generated": 1.0}, r"generated is 1\.0. Give a whole number"),
    "generated text": ({"generated": "1"}, "generated is '1'. Give a whole number"),
    "text": ({"text": 5}, "text is 5, which is not text"),
    "half a character": ({"text": "\ud800"}, "which is not text"),
    "half in metadata": ({"metadata": {"a": "\ud800"}}, "metadata cannot be kept as JSON"),
    "metadata type": ({"metadata": "a"}, "metadata are a str. Give a dict"),
    "domain": ({"domain": 7}, "domain is 7, which is not text"),
    "metadata": ({"metadata": {"a": object()}}, "metadata cannot be kept as JSON"),
}


@pytest.mark.parametrize("case", _WRONG)
def test_what_cannot_be_right_is_refused_and_nothing_is_taken(case: str, tmp_path: Path) -> None:
    good: dict[str, Any] = {
        "token_ids": [1, 2],
        "expert_ids": np.tile([1, 2], (2, 3, 1)),
        "weights": np.tile(np.array([0.5, 0.25], np.float32), (2, 3, 1)),
    }
    changed, message = _WRONG[case]
    writer = moewh.Writer(tmp_path / "wh", "mine", "m", **SHAPE)
    with pytest.raises(UsageError, match=message) as refused:
        writer.write(**{**good, **changed})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "wh").exists()
    writer.write(**good)
    writer.close()
    assert len(rows(tmp_path / "wh")) == 2 * L * K


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("segment_rows", [1, 64_000_000])
def test_weights_of_some_sequences_only_are_refused(weighted: bool, segment_rows: int, tmp_path: Path) -> None:
    """A segment has weights or none: those of the others would be lost, or the routes of the others."""
    ids, weights = np.tile([1, 2], (2, 3, 1)), np.full((2, 3, 2), 0.5, np.float32)
    given = (weights, None) if weighted else (None, weights)
    with moewh.Writer(tmp_path, "mine", "m", segment_rows=segment_rows, **SHAPE) as writer:
        writer.write([1, 2], ids, given[0])
        with pytest.raises(UsageError, match=r"^sequence 1 (lacks|has) weights, which .* Write them as two runs\.$"):
            writer.write([1, 2], ids, given[1])
        writer.write([3, 4], ids, given[0])
    assert len(rows(tmp_path)) == 2 * 2 * L * K


def test_a_run_that_exists_or_has_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoewhError, match="'mine' has no sequence"), moewh.Writer(tmp_path, "mine", "m", **SHAPE):
        pass
    with moewh.Writer(tmp_path, "mine", "m", **SHAPE) as writer:
        writer.write(*sequences(1)[0])
    says = rf"run 'mine' exists already\. .* `moewh runs --delete mine --warehouse {tmp_path}`\."
    with pytest.raises(MoewhError, match=says):
        moewh.Writer(tmp_path, "mine", "m", **SHAPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the MoE layers are unknown"),
        ({"layers": [1], "top_k": 2}, "go together"),
        ({"layers": [1, 1], "num_experts": 4, "top_k": 2}, r"layers are \[1, 1\]"),
        ({"layers": [1], "num_experts": 4, "top_k": 5}, "top_k is 5 of 4 experts"),
        ({"model": 7}, "model is a int"),
        ({**SHAPE, "tokenizer": "gpt2"}, "the tokenizer is a str. Give a loaded one"),
        ({**SHAPE, "ordered": "false"}, "ordered is 'false'. Give True or False"),
        ({**SHAPE, "series": ""}, "series is empty. Give a name, or None"),
        ({**SHAPE, "layers": 3}, "layers is 3. Give a list"),
        ({**SHAPE, "layers": "134"}, "layers is '134'. Give a list"),
        ({**SHAPE, "layers": [3, 1]}, "in the order of the layers. Give both ascending"),
        ({**SHAPE, "layers": [1.0]}, r"a layer is 1\.0. Give a whole number"),
        ({**SHAPE, "layers": [2**40]}, "Give a whole number of at most"),
        ({**SHAPE, "num_experts": 8.0}, r"num_experts is 8\.0"),
        ({**SHAPE, "top_k": "2"}, "top_k is '2'"),
        ({**SHAPE, "series": 5}, "series is 5, which is not text"),
        ({**SHAPE, "train_step": "5"}, "train_step is '5'"),
        ({**SHAPE, "segment_rows": 0}, "segment_rows is 0. Give a whole number of at least 1"),
    ],
)
def test_a_shape_that_no_model_has_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        moewh.Writer(tmp_path, "mine", **arguments)


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    """Token ids, weights, and ranks of experts in no order."""
    given = sequences(4)
    for run, ordered in (("unordered", False), ("ordered", True)):
        with moewh.Writer(tmp_path, run, "m", **SHAPE, ordered=ordered) as writer:
            for _, expert_ids, _ in given:
                writer.write(None, expert_ids)
    warehouse = moewh.open(tmp_path)
    asked = "select token_id, layer, rank, expert, weight from routing where run_id = $run order by all"
    for run, places in (("unordered", [None] * K), ("ordered", range(K))):
        expected = [
            (prompt * 2**24 + position, layer, rank, expert, None)
            for prompt, (_, expert_TLK, _) in enumerate(given)
            for position, expert_LK in enumerate(expert_TLK.tolist())
            for layer, experts in zip(SHAPE["layers"], expert_LK, strict=True)
            for rank, expert in zip(places, experts, strict=True)
        ]
        found = warehouse.sql(asked, run=run).fetchall()
        assert sorted(found, key=str) == sorted(expected, key=str)
    unknown = warehouse.sql("select count(vocab_id), count(token), count(*) > 0 from tokens").fetchall()
    assert unknown == [(0, 0, True)]
    assert warehouse.sql("select count(text), count(*) from prompts").fetchall() == [(0, 8)]
    loads = warehouse.query("expert_load").df()
    assert loads["tokens"].sum() == 2 * sum(expert_TLK.size for _, expert_TLK, _ in given)
    assert warehouse.verify() == []
