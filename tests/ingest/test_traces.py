"""Traces of every format become exactly the rows that they hold."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import moewh
from moewh.cli.main import main
from moewh.ingest.traces.arrays import load_torch
from moewh.ingest.traces.numbers import take_arrays
from moewh.ingest.traces.trace import TraceFile, format_names
from moewh.ingest.write import segment
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.verify import check, plan
from tests.support.faults import Server
from tests.support.models import byte_tokenizer
from tests.support.opened import viewed
from tests.support.traces import (
    COUNT_WRITERS,
    EXPERTS,
    MOE,
    TOP_K,
    WRITERS,
    config,
    expected,
    lines,
    recorder_dump,
    rows_of,
    sglang_answer,
    traced,
    vllm_answer,
    write_flame,
    write_plain,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config(tmp_path_factory.mktemp("models") / "tiny-v3")


def run_import(form: str, files: list[Path], model: Path, layout: Layout, *more: str) -> Result:
    words = ["import", form, *map(str, files), "--model", str(model), "--warehouse", str(layout.root), *more]
    return CliRunner().invoke(main, words)


def imported(form: str, files: list[Path], model: Path, root: Path, *more: str) -> Layout:
    layout = Layout(root)
    result = run_import(form, files, model, layout, *more)
    assert result.exit_code == 0, result.output
    return layout


def ask(layout: Layout, sql: str) -> list[tuple[Any, ...]]:
    with viewed(layout) as connection:
        return connection.execute(sql).fetchall()


def require_sound(layout: Layout) -> None:
    assert check(plan(layout)) == []
    result = CliRunner().invoke(main, ["check", "--warehouse", str(layout.root)])
    assert result.exit_code == 0, result.output


# ------------------------------------------------------------------------------------------ every format


def test_every_format_is_tested() -> None:
    assert sorted({name for name, _ in WRITERS.values()} | {*COUNT_WRITERS, "flame-moe"}) == format_names()


@pytest.mark.parametrize("case", WRITERS)
def test_format_gives_its_rows(case: str, model: Path, tmp_path: Path) -> None:
    form, write = WRITERS[case]
    trace = traced()
    layout = imported(form, write(tmp_path, trace), model, tmp_path / "wh")
    assert rows_of(layout) == expected(trace)
    told = ask(layout, "select prompt_id, position, vocab_id, kind, token from tokens order by all")
    # the recorder and Megatron do not see a last token; the latter two, and OpenAI's responses, have no ids
    without_last = form in ("sglang-recorder", "megatron")
    known = form != "megatron" and case != "sglang, OpenAI"
    split = form not in ("sglang-recorder", "megatron")
    assert told == [
        (
            prompt,
            position,
            int(token) if known else None,
            "generated" if split and position >= one.prompt else "prompt",
            None,
        )
        for prompt, one in enumerate(trace)
        for position, token in enumerate(one.ids_T[:-1] if without_last else one.ids_T)
    ]
    (stored,) = ask(layout, "select num_experts, top_k, num_moe_layers, status, options, tokens_key from runs")
    assert stored[:4] == (EXPERTS, TOP_K, len(MOE), "complete")
    assert json.loads(stored[4])["import"] == form
    assert ask(layout, "select origin, origin_format from runs") == [("imported", form)]
    assert (stored[5] is not None) == known
    assert check(plan(layout)) == []


def test_flame_moe_ranks_by_weight_ties_by_expert(model: Path, tmp_path: Path) -> None:
    """Float16 scores tie; the order of ties in the file means nothing, and half of its rows are reversed."""
    rng = np.random.default_rng(1)
    tokens = 50
    ids = rng.integers(0, 200, tokens)
    experts = np.argsort(rng.random((tokens, 2, EXPERTS)), -1)[..., :TOP_K]
    scores = np.sort(rng.choice([0.25, 0.5], (tokens, 2, TOP_K)).astype(np.float16), -1)[..., ::-1]
    assert (scores[..., 0] == scores[..., 1]).any()
    layout = imported("flame-moe", write_flame(tmp_path, ids, experts, scores), model, tmp_path / "wh")
    rows = []
    for position in range(tokens):
        for place, layer in enumerate(MOE):
            pairs = sorted(zip(-scores[position, place], experts[position, place], strict=True))
            rows += [(0, position, layer, rank, int(e), float(-w)) for rank, (w, e) in enumerate(pairs)]
    assert sorted(rows) == sorted(rows_of(layout))
    assert ask(layout, "select distinct json_extract_string(metadata, 'boundaries') from prompts") == [("unknown",)]
    require_sound(layout)


@pytest.mark.parametrize("form", COUNT_WRITERS)
def test_counts_alone_are_load_and_nothing_else(form: str, model: Path, tmp_path: Path) -> None:
    counts = np.random.default_rng(2).integers(0, 40, (len(MOE), EXPERTS))
    counts[0, 3] = 0
    layout = imported(form, COUNT_WRITERS[form](tmp_path, counts), model, tmp_path / "wh", "--domain", "code")
    loads = [(layer, e, int(n)) for layer, row in zip(MOE, counts, strict=True) for e, n in enumerate(row)]
    assert ask(layout, "select layer, expert, tokens from expert_load order by all") == loads
    for name in ("routes", "co_routing", "layer_transitions", "expert_token_affinity", "first_choice_paths", "tokens"):
        assert ask(layout, f"from {name}") == [], name
    first, weights = "first_choice_tokens", "weight_sum"
    assert ask(layout, f"select distinct {first}, {weights} from expert_load where tokens > 0") == [(None, None)]
    assert ask(layout, "select distinct domain, json_extract(metadata, 'counts_alone') from prompts") == [
        ("code", "true")
    ]
    assert check(plan(layout)) == []
    with moewh.open(layout.root) as wh:
        (run_id,) = wh.sql("select run_id from runs").fetchall()[0]
        with pytest.raises(MoewhError, match=r"no run in .* has tokens"):
            moewh.plots.tokens(wh, 0)
        with pytest.raises(MoewhError, match=f"run {run_id} has no tokens to show: it holds only counts"):
            moewh.plots.tokens(wh, 0, run=run_id)
    # beside a run with rows, every check passes
    imported("plain", write_plain(tmp_path, traced()), model, layout.root)
    require_sound(layout)


# ------------------------------------------------------------------------------------------ the three traps


def test_order_of_a_row_is_no_rank(model: Path, tmp_path: Path) -> None:
    """A naive importer takes the slot for the rank, and derives first choices from it."""
    trace = traced()
    layout = imported("vllm", WRITERS["vllm"][1](tmp_path, trace), model, tmp_path / "wh")
    assert ask(layout, "select distinct rank from routing") == [(None,)]
    assert ask(layout, "from first_choice_transitions") == []
    ordered = [{"expert_ids": one.experts_RLK.tolist(), "ordered": True} for one in trace]
    layout = imported("plain", lines(tmp_path / "ordered.jsonl", ordered), model, tmp_path / "wh2")
    first = [(int(row[0, 0]),) for one in trace for row in one.experts_RLK]
    assert ask(layout, f"select expert from routing where rank = 0 and layer = {MOE[0]} order by token_id") == first


@pytest.mark.parametrize("case", ["vllm", "sglang", "verl", "slime"])
def test_row_of_zeros_is_no_route(case: str, model: Path, tmp_path: Path) -> None:
    """A naive importer counts tokens of the dense layer, and of rows that were not captured, for expert 0."""
    trace = traced()
    for one in trace:
        one.experts_RLK[1] = 0
    form, write = WRITERS[case]
    layout = imported(form, write(tmp_path, trace), model, tmp_path / "wh")
    kept = [row for row in expected(trace) if row[1] != 1]
    assert rows_of(layout) == kept
    assert ask(layout, "select distinct layer from routing order by 1") == [(layer,) for layer in MOE]
    assert check(plan(layout)) == []


def test_a_last_row_that_was_captured_is_kept(model: Path, tmp_path: Path) -> None:
    """verl leaves zeros for the last token of a sequence; whoever ran it has a row to keep."""
    trace = traced()
    last_1LK = np.broadcast_to(np.arange(1, TOP_K + 1), (1, len(MOE), TOP_K))
    trace[::2] = [replace(one, experts_RLK=np.concatenate([one.experts_RLK, last_1LK])) for one in trace[::2]]
    form, write = WRITERS["verl"]
    layout = imported(form, write(tmp_path, trace), model, tmp_path / "wh")
    assert rows_of(layout) == expected(trace)


def test_row_of_zero_is_a_route_with_one_expert_per_token(tmp_path: Path) -> None:
    model = config(tmp_path / "top-1", num_experts_per_tok=1)
    ids = [[[0], [0], [5]], [[0], [3], [0]]]
    layout = imported("plain", lines(tmp_path / "t.jsonl", [{"expert_ids": ids}]), model, tmp_path / "wh")
    assert ask(layout, "select token_id, layer, expert from routing order by all") == [
        (0, 1, 0),
        (0, 2, 5),
        (1, 1, 3),
        (1, 2, 0),
    ]


@pytest.mark.parametrize("form", ["plain", "vllm"])
def test_one_expert_per_token_is_the_first_choice(form: str, tmp_path: Path) -> None:
    model = config(tmp_path / "top-1", num_experts_per_tok=1)
    ids = [[[0], [0], [5]], [[0], [3], [0]]]
    record = {"expert_ids": ids} if form == "plain" else {"choices": [{"routed_experts": ids}]}
    layout = imported(form, lines(tmp_path / "t.jsonl", [record]), model, tmp_path / "wh")
    assert ask(layout, "select distinct rank from routing") == [(0,)]
    assert ask(layout, "select sum(first_choice_tokens) from expert_load") == [(4,)]
    require_sound(layout)


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_layer_that_was_not_captured_separates_its_neighbours(missing: int, with_weights: bool, tmp_path: Path) -> None:
    """In the first segment only: no transition leads over it, and the second segment has all."""
    model = config(tmp_path / "tiny", num_hidden_layers=4)
    whole = np.array([[[1, 2], [3, 4], [5, 6]], [[2, 3], [4, 5], [6, 7]]])
    part = whole.copy()
    part[:, missing] = -1
    records = [{"expert_ids": ids.tolist()} for ids in (part, whole)]
    if with_weights:
        records = [record | {"weights": np.full(whole.shape, 0.5).tolist()} for record in records]
    layout = imported("plain", lines(tmp_path / "t.jsonl", records), model, tmp_path / "wh", "--segment-rows", "12")
    pairs = {(layer, layer + 1): 8 * (2 if missing not in (layer - 1, layer) else 1) for layer in (1, 2)}
    sql = "select layer, next_layer, sum(tokens)::bigint from layer_transitions where tokens > 0 group by all"
    assert {(layer, after): tokens for layer, after, tokens in ask(layout, sql)} == pairs
    require_sound(layout)


def test_weights_that_were_not_recorded_are_null(model: Path, tmp_path: Path) -> None:
    layout = imported("sglang", WRITERS["sglang"][1](tmp_path, traced()), model, tmp_path / "wh")
    assert ask(layout, "select distinct weight from routing") == [(None,)]
    assert ask(layout, "select distinct weight_sum, mean_weight from expert_load where tokens > 0") == [(None, None)]


# ------------------------------------------------------------------------------------------ details of formats


def test_physical_ids_are_mapped(model: Path, tmp_path: Path) -> None:
    """The dump's placement reverses the experts; with one that does not, the same ids mean others."""
    trace = traced()
    dump = recorder_dump(trace)
    dump["last_physical_to_logical_map"] = dump["last_physical_to_logical_map"].flip(1)
    torch.save(dump, tmp_path / "dump.pt")
    layout = imported("sglang-recorder", [tmp_path / "dump.pt"], model, tmp_path / "wh")
    reverse = [(*row[:4], EXPERTS - 1 - row[4], None) for row in expected(trace)]
    assert rows_of(layout) == sorted(reverse, key=lambda row: (*row[:3], row[4]))


def test_decoding_pass_has_a_context_per_token(model: Path, tmp_path: Path) -> None:
    dump = recorder_dump(traced())
    dump["records"][0]["extend_seq_lens"] = None
    torch.save(dump, tmp_path / "decode.pt")
    layout = imported("sglang-recorder", [tmp_path / "decode.pt"], model, tmp_path / "wh")
    ((tokens, contexts, prompts),) = ask(
        layout, "select count(*), count(distinct context), count(distinct prompt_id) from tokens"
    )
    assert (contexts, prompts) == (tokens, 1)
    assert ask(layout, "from expert_repetition") == [], "tokens of other requests are no neighbours"
    require_sound(layout)


def test_pass_without_tokens_is_none(model: Path, tmp_path: Path) -> None:
    """A process without work takes part in the passes of the others; its lengths may be a tensor."""
    trace, dump = traced(), recorder_dump(traced())
    record = dump["records"][0]
    idle = {"input_ids": [], "positions": [], "topk_ids_of_layer": record["topk_ids_of_layer"][:, :0]}
    record["extend_seq_lens"] = torch.tensor(record["extend_seq_lens"])
    dump["records"] = [{**record, **idle, "extend_seq_lens": None}, record, {**record, **idle, "extend_seq_lens": []}]
    torch.save(dump, tmp_path / "dump.pt")
    layout = imported("sglang-recorder", [tmp_path / "dump.pt"], model, tmp_path / "wh")
    assert rows_of(layout) == expected(trace)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mapped files")
def test_tensors_are_mapped_from_the_file(tmp_path: Path) -> None:
    """A dump of any size takes only the memory of the records being read."""
    torch.save({"records": [torch.arange(3)]}, tmp_path / "dump.pt")
    dump = load_torch(TraceFile(tmp_path / "dump.pt", "dump.pt", 100))
    assert dump["records"][0].tolist() == [0, 1, 2]
    assert str(tmp_path / "dump.pt") in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("field", ["prompt_token_ids", "prompt_routed_experts"])
@pytest.mark.parametrize("null_in", ["choice", "answer"])
def test_null_in_one_place_hides_no_value_in_the_other(field: str, null_in: str, model: Path, tmp_path: Path) -> None:
    """vLLM's answers have all their fields, null where there is nothing."""
    trace = traced(sequences=1)
    (one,) = trace
    routed = one.hidden_RLK.tolist()
    ids = one.ids_T.tolist()
    choice = {"prompt_token_ids": ids[: one.prompt], "token_ids": ids[one.prompt :], "routed_experts": routed}
    if field == "prompt_routed_experts":
        choice |= {field: routed[:1], "routed_experts": routed[1:]}
    answer = {field: choice.pop(field)}
    (answer if null_in == "choice" else choice)[field] = answer.pop(field)
    (choice if null_in == "choice" else answer)[field] = None
    files = lines(tmp_path / "t.jsonl", [{**answer, "choices": [choice]}])
    layout = imported("vllm", files, model, tmp_path / "wh")
    assert rows_of(layout) == expected(trace)
    assert [vocab for (vocab,) in ask(layout, "select vocab_id from tokens order by token_id")] == ids


@pytest.mark.parametrize(
    "reward",
    [np.float64(0.5), np.int64(1), np.bool_(True), np.array([True]), np.ones(1, np.float16), np.array(["good"])],
    ids=lambda value: f"{type(value).__name__}-{value.dtype}",
)
def test_plain_values_of_numpy_in_a_rollout(reward: Any, model: Path, tmp_path: Path) -> None:
    trace = traced()
    (path,) = WRITERS["slime"][1](tmp_path, trace)
    saved = load_torch(TraceFile(path, path.name, 1 << 20))
    torch.save({**saved, "samples": [{**sample, "reward": reward} for sample in saved["samples"]]}, path)
    assert rows_of(imported("slime", [path], model, tmp_path / "wh")) == expected(trace)


def test_rows_from_a_later_position(model: Path, tmp_path: Path) -> None:
    """`routed_experts_prompt_start` and `routed_experts_start_len` leave out the first rows."""
    one = traced(sequences=1)[0]
    short = vllm_answer(type(one)(one.ids_T, one.prompt, one.experts_RLK[one.prompt :]))
    layout = imported("vllm", lines(tmp_path / "v.jsonl", [short]), model, tmp_path / "wh")
    assert rows_of(layout) == [row for row in expected([one]) if row[1] >= one.prompt]
    short = sglang_answer(type(one)(one.ids_T, one.prompt, one.experts_RLK[one.prompt :]))
    layout = imported("sglang", lines(tmp_path / "s.jsonl", [short]), model, tmp_path / "wh2")
    assert rows_of(layout) == [row for row in expected([one]) if row[1] >= one.prompt]


def test_sglang_without_the_prompts_ids(model: Path, tmp_path: Path) -> None:
    one = traced(sequences=1)[0]
    answer = sglang_answer(one)
    del answer["meta_info"]["input_token_logprobs"]
    layout = imported("sglang", lines(tmp_path / "s.jsonl", [answer]), model, tmp_path / "wh")
    ids = [(None,)] * one.prompt + [(int(token),) for token in one.ids_T[one.prompt :]]
    assert ask(layout, "select vocab_id from tokens order by token_id") == ids
    assert ask(layout, "select tokens_key from runs") == [(None,)]
    require_sound(layout)


def test_microbatches_of_a_step(model: Path, tmp_path: Path) -> None:
    trace = traced()
    path = WRITERS["megatron"][1](tmp_path, trace)[0]
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    lines(path, [{**document, "step": 0, "layer": document["layer"] + 1} for document in documents])
    layout = imported("megatron", [path], model, tmp_path / "wh")
    assert rows_of(layout) == expected(trace), "layers may be numbered from 1"


def test_tokenizer_gives_texts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "bytes")
    ids = tokenizer("naïve")["input_ids"]
    trace = [{"expert_ids": [[[1, 2], [3, 4]]] * (len(ids) - 1), "token_ids": ids}]
    files = lines(tmp_path / "t.jsonl", trace)
    wide = config(tmp_path / "wide", vocab_size=300)
    layout = imported("plain", files, wide, tmp_path / "wh", "--tokenizer", str(tmp_path / "bytes"))
    tokens = ask(layout, "select token, kind from tokens order by token_id")
    assert tokens[:3] == [("<s>", "special"), ("n", "prompt"), ("a", "prompt")]
    assert ask(layout, "select text from prompts") == [("<s>naïve",)]
    require_sound(layout)


# ------------------------------------------------------------------------------------------ segments


def test_segments_do_not_change_answers(model: Path, tmp_path: Path) -> None:
    trace = traced(sequences=9)
    files = write_plain(tmp_path, trace)
    whole = imported("plain", files, model, tmp_path / "one")
    cut = imported("plain", files, model, tmp_path / "many", "--segment-rows", "50")
    assert ask(cut, "select max(routing_rows) <= 50, count(*) > 3, sum(last::int) from segments") == [(True, True, 1)]
    assert rows_of(cut) == rows_of(whole) == expected(trace)
    for view in ("co_routing", "expert_repetition", "expert_token_affinity"):
        both = [ask(layout, f"select * exclude run_id from {view} order by all") for layout in (whole, cut)]
        assert both[0] == both[1], view
    require_sound(cut)


def test_killed_and_run_again_completes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, more = write_plain(tmp_path, traced(sequences=9)), ("--segment-rows", "50")
    whole = imported("plain", files, model, tmp_path / "whole", *more)
    layout = Layout(tmp_path / "wh")
    write = segment.write_segment

    def dying(*arguments: Any, **named: Any) -> Any:
        if arguments[2] == 2:
            raise KeyboardInterrupt
        return write(*arguments, **named)

    monkeypatch.setattr("moewh.ingest.traces.run.write_segment", dying)
    assert run_import("plain", files, model, layout, *more).exit_code != 0
    assert ask(layout, "select status, segments from runs") == [("running", 2)]
    monkeypatch.setattr("moewh.ingest.traces.run.write_segment", write)
    before = {path: path.stat().st_mtime_ns for path in layout.root.glob("segments/run_id=t*/*/*")}
    imported("plain", files, model, layout.root, *more)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert rows_of(layout) == rows_of(whole)
    names = [path.relative_to(whole.root) for path in whole.root.glob("segments/run_id=t*/*/*")]
    assert names
    assert all((whole.root / name).read_bytes() == (layout.root / name).read_bytes() for name in names)
    again = run_import("plain", files, model, layout, *more)
    assert "complete already; nothing was written" in again.output
    assert not list(layout.staging.glob("*.part"))


def test_sigkill_between_segments(model: Path, tmp_path: Path, server: Server) -> None:
    files = write_plain(tmp_path, traced(sequences=60))
    more = ("--segment-rows", "50")
    whole = imported("plain", files, model, tmp_path / "whole", *more)
    words = ["import", "plain", str(files[0]), "--model", str(model), "--warehouse", str(tmp_path / "wh"), *more]
    layout = Layout(tmp_path / "wh")
    pid, deadline = server.start("moewh", arguments=words, root=str(layout.root)), time.monotonic() + 60
    while len(list(layout.root.glob("segments/run_id=t*/segment=*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert server.wait(pid)["code"] == -signal.SIGKILL, "it was still at work"
    (killed,) = ask(layout, "select status, segments from runs")
    assert killed[0] == "running"
    imported("plain", files, model, layout.root, *more)
    names = [path.relative_to(whole.root) for path in whole.root.glob("segments/run_id=t*/*/*")]
    assert len(names) > killed[1]
    assert all((whole.root / name).read_bytes() == (layout.root / name).read_bytes() for name in names)
    assert not list(layout.staging.glob("*.part")), "what was left behind is gone"


def test_other_file_is_another_run(model: Path, tmp_path: Path) -> None:
    layout = imported("plain", write_plain(tmp_path, traced(0)), model, tmp_path / "wh", "--run-id", "mine")
    result = run_import("plain", write_plain(tmp_path, traced(1)), model, layout, "--run-id", "mine")
    assert result.exit_code == 1
    assert "run 'mine' exists and is another run: files was" in result.output


@pytest.mark.parametrize(
    ("text", "field", "array"),
    [
        ('{"a": [[1, 2], [3, 4]], "b": 1}', "a", [[1, 2], [3, 4]]),
        ('{"a":[ [1,2 ],\t[3,-4]]}', "a", [[1, 2], [3, -4]]),
        ('{"a": [[[0.5, 1e-3]]]}', "a", [[[0.5, 1e-3]]]),
        ('{"a": [7]}', "a", [7]),
        ('{"a": [[1, 2], [3]]}', "a", None),
        ('{"a": [[1], [2, 3], [4]]}', "a", None),
        ('{"a": [[1, 2], 3]}', "a", None),
        ('{"a": [1, NaN]}', "a", None),
        ('{"a": [1, 18446744073709551615]}', "a", None),
        ('{"a": [-18446744073709551615]}', "a", None),
        ('{"a": [1, "2"]}', "a", None),
        ('{"a": [1 2]}', "a", None),
        ('{"a": [1.2.3]}', "a", None),
        ('{"a": []}', "a", None),
        ('{"a": [[], []]}', "a", None),
        ('{"a": [1, , 2]}', "a", None),
        ('{"a": [1], "a": [2]}', "a", None),
        ('{"b": "\\"a\\": [1]"}', "a", None),
    ],
)
def test_arrays_are_taken_out_of_json_only_whole(text: str, field: str, array: list[Any] | None) -> None:
    rest, taken = take_arrays(text.encode(), [field])
    if array is None:
        assert (rest, taken) == (text.encode(), {})
        return
    assert taken[field].tolist() == array == json.loads(text)[field]
    assert json.loads(rest) == {**json.loads(text), field: None}


def test_array_that_a_text_quotes_stays_in_it(model: Path, tmp_path: Path) -> None:
    text = '{"expert_ids": [[[1, 2], [3, 4]]], "text": "about \'token_ids\'", "metadata": {"token_ids": [5, 6]}}\n'
    (tmp_path / "t.jsonl").write_text(text + text)
    layout = imported("plain", [tmp_path / "t.jsonl"], model, tmp_path / "wh")
    assert ask(layout, "select distinct metadata from prompts") == [('{"token_ids": [5, 6]}',)]
    assert ask(layout, "select distinct vocab_id from tokens") == [(None,)]


def test_repair_names_the_import_that_writes_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = traced(sequences=9)
    files = write_plain(tmp_path, trace)
    layout = imported("plain", files, model, tmp_path / "wh", "--segment-rows", "50", "--domain", "a b")
    (segment,) = layout.root.glob("segments/run_id=t*/segment=1")
    (segment / "routing.parquet").write_bytes(b"")
    result = CliRunner().invoke(main, ["verify", "--repair", "--warehouse", str(layout.root)])
    (command,) = re.findall(r"moewh (import .*)", result.output)
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(main, shlex.split(command.rstrip("`. ")))
    assert again.exit_code == 0, again.output
    assert rows_of(layout) == expected(trace)
    assert check(plan(layout)) == []


def test_plain_example_of_the_page(tmp_path: Path) -> None:
    """The line that docs/import.md shows, and the configuration that it shows for a model of its own."""
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    (tmp_path / "t.jsonl").write_text(next(line for line in page.splitlines() if line.startswith('{"expert_ids"')))
    (shape,) = re.findall(r'`({"model_type": "olmoe".*?})`', page, re.DOTALL)
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads(shape), "num_hidden_layers": 2, "num_experts_per_tok": 2})
    )
    layout = imported("plain", [tmp_path / "t.jsonl"], tmp_path / "config.json", tmp_path / "wh")
    assert ask(layout, "select rank, expert from routing where token_id = 1 and layer = 1 order by rank") == [
        (0, 0),
        (1, 1),
    ]


def test_every_format_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    assert sorted(re.findall(r"(?m)^\| `([a-z-]+)` \|", page)[: len(format_names())]) == format_names()


def test_imatrix_of_the_gguf_package(model: Path, tmp_path: Path) -> None:
    """Written by ggml-org's own writer, where it is installed."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    counts = np.random.default_rng(2).integers(0, 40, (len(MOE), EXPERTS))
    for place, layer in enumerate(MOE):
        name = f"blk.{layer}.ffn_down_exps.weight"
        writer.add_tensor(f"{name}.in_sum2", np.ones((EXPERTS, 16), np.float32))
        writer.add_tensor(f"{name}.counts", counts[place].astype(np.float32).reshape(EXPERTS, 1))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    layout = imported("llama-imatrix", [tmp_path / "imatrix.gguf"], model, tmp_path / "wh")
    loads = [(layer, e, int(n)) for layer, row in zip(MOE, counts, strict=True) for e, n in enumerate(row)]
    assert ask(layout, "select layer, expert, tokens from expert_load order by all") == loads
