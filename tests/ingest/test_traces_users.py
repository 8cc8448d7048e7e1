"""What users of engines and trainers hand to `moewh import`: recorded as they mean it, or refused in one line."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moewh.warehouse.files.layout import Layout
from tests.support.imports import require_refused, run_import
from tests.support.opened import viewed
from tests.support.traces import (
    HIDDEN,
    TOP_K,
    WRITERS,
    Traced,
    config,
    expected,
    lines,
    npy,
    recorder_dump,
    rows_of,
    sglang_answer,
    traced,
    vllm_answer,
    write_flame,
    write_tensorrt_llm,
)

TRACE = traced()
ONE = TRACE[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config(tmp_path_factory.mktemp("models") / "tiny-v3")


def kinds_of(root: Path) -> list[tuple[Any, ...]]:
    with viewed(Layout(root / "wh")) as connection:
        return connection.execute("select prompt_id, kind, vocab_id from tokens order by token_id").fetchall()


def stored(path: Path, value: Any) -> list[Path]:
    """Write JSON, or what the name says."""
    if path.suffix == ".pt":
        torch.save(value, path)
    elif path.suffix == ".npz":
        np.savez(path, **value)
    else:
        path.write_text(json.dumps(value))
    return [path]


# ------------------------------------------------------------------------------------------ answers


def batch() -> dict[str, Any]:
    """One answer of /v1/completions to all prompts of the trace."""
    choices = [{**vllm_answer(one)["choices"][0], "index": number} for number, one in enumerate(TRACE)]
    return {"id": "cmpl-1", "model": "tiny", "choices": choices, "usage": {"prompt_tokens": 9}}


def test_batch_answer_is_a_prompt_each(model: Path, tmp_path: Path) -> None:
    for number, indent in enumerate((None, 2)):
        root = tmp_path / str(number)
        root.mkdir()
        (root / "batch.json").write_text(json.dumps(batch(), indent=indent))
        assert run_import("vllm", [root / "batch.json"], model, root).exit_code == 0
        assert rows_of(Layout(root / "wh")) == expected(TRACE)


def test_lines_of_batch_output(model: Path, tmp_path: Path) -> None:
    """`vllm run_batch` wraps each answer as OpenAI's batch API does."""
    wrapped = [
        {"id": f"vllm-{n}", "custom_id": f"r{n}", "response": {"status_code": 200, "body": vllm_answer(one)}}
        for n, one in enumerate(TRACE)
    ]
    documents = [{**line, "error": None} for line in wrapped]
    assert run_import("vllm", lines(tmp_path / "out.jsonl", documents), model, tmp_path).exit_code == 0
    assert rows_of(Layout(tmp_path / "wh")) == expected(TRACE)
    shutil.rmtree(tmp_path / "wh")
    failed = {"custom_id": "r9", "response": None, "error": {"message": "too long"}}
    result = run_import("vllm", lines(tmp_path / "out.jsonl", [*documents, failed]), model, tmp_path)
    require_refused(result, "out.jsonl, line 5: the request 'r9' failed. Leave its line out.", tmp_path)


@pytest.mark.parametrize("form", ["vllm", "sglang", "sglang, OpenAI"])
def test_an_answer_counts_once(form: str, model: Path, tmp_path: Path) -> None:
    """Files that were concatenated, or of a script that was started again, hold some answers twice."""
    name, write = WRITERS[form]
    text = write(tmp_path, TRACE)[0].read_text()
    answers = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    for number, answer in enumerate(answers):
        answer.get("meta_info", answer)["id"] = f"answer-{number}"
    first, second = lines(tmp_path / "first.jsonl", answers), lines(tmp_path / "second.jsonl", answers[2:])
    result = run_import(name, [*first, *second], model, tmp_path)
    require_refused(result, "second.jsonl, line 1", tmp_path)
    assert "answer-2" in result.output and "again, whose rows would count twice. Leave it out." in result.output
    for number, answer in enumerate(again := json.loads(json.dumps(answers))):  # equal answers of two requests
        answer.get("meta_info", answer)["id"] = f"other-{number}"
    second = lines(tmp_path / "second.jsonl", again)
    assert run_import(name, [*first, *second], model, tmp_path).exit_code == 0
    assert rows_of(Layout(tmp_path / "wh")) == expected(TRACE * 2)


def test_samples_of_one_prompt(model: Path, tmp_path: Path) -> None:
    """A chat answer with n = 2 has the prompt's ids once."""
    choice = {name: value for name, value in vllm_answer(ONE)["choices"][0].items() if name != "prompt_token_ids"}
    answer = {"prompt_token_ids": ONE.ids_T[: ONE.prompt].tolist(), "choices": [choice, choice]}
    assert run_import("vllm", stored(tmp_path / "chat.json", answer), model, tmp_path).exit_code == 0
    assert rows_of(Layout(tmp_path / "wh")) == expected([ONE, ONE])
    assert kinds_of(tmp_path) == [
        (prompt, "generated" if position >= ONE.prompt else "prompt", int(token))
        for prompt in (0, 1)
        for position, token in enumerate(ONE.ids_T)
    ]


def test_prompt_without_an_answer(model: Path, tmp_path: Path) -> None:
    """The last prompt token has a row in vLLM if something was sampled after it, in SGLang never."""
    (tmp_path / "v").mkdir()
    (tmp_path / "s").mkdir()
    whole = Traced(ONE.ids_T[:-1], len(ONE.ids_T) - 1, ONE.experts_RLK)
    answer = vllm_answer(whole)
    assert answer["choices"][0]["token_ids"] == []
    assert run_import("vllm", stored(tmp_path / "v" / "a.json", answer), model, tmp_path / "v").exit_code == 0
    assert rows_of(Layout(tmp_path / "v" / "wh")) == expected([ONE])
    short = sglang_answer(Traced(ONE.ids_T, len(ONE.ids_T), ONE.experts_RLK))
    assert short["output_ids"] == []
    assert run_import("sglang", stored(tmp_path / "s" / "a.json", short), model, tmp_path / "s").exit_code == 0
    assert rows_of(Layout(tmp_path / "s" / "wh")) == expected([ONE])
    for root in ("v", "s"):
        assert {kind for _, kind, _ in kinds_of(tmp_path / root)} == {"prompt"}


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_answers_of_two_models_are_two_runs(form: str, model: Path, tmp_path: Path) -> None:
    def answer(one: Traced) -> dict[str, Any]:
        if form == "vllm":
            return vllm_answer(one)
        usage = {"prompt_tokens": one.prompt, "completion_tokens": len(one.ids_T) - one.prompt}
        routed = sglang_answer(one)["meta_info"]["routed_experts"]
        return {"choices": [{"index": 0}], "usage": usage, "sgl_ext": {"routed_experts": routed}}

    names = ["base", "base", "base-lora", "base"]
    documents = [{**answer(one), "model": name} for one, name in zip(TRACE, names, strict=True)]
    result = run_import(form, lines(tmp_path / "t.jsonl", documents), model, tmp_path)
    said = "is an answer of base-lora, what came before of base. Import them as two runs."
    require_refused(result, said, tmp_path)
    assert run_import(form, lines(tmp_path / "t.jsonl", documents[:2]), model, tmp_path).exit_code == 0


def changed(field: str, value: Any) -> Any:
    answer = vllm_answer(ONE)
    answer["choices"][0][field] = value
    return answer


def counted(prompt: Any, generated: Any = 3) -> Any:
    answer = sglang_answer(ONE)
    answer["meta_info"] |= {"prompt_tokens": prompt, "completion_tokens": generated}
    return answer


PLAIN = {"expert_ids": [[[1, 2], [3, 4]]]}
WRONG: dict[str, tuple[str, str, Any, str]] = {
    "ids of the prompt alone": ("vllm", "t.json", changed("token_ids", None), "has prompt_token_ids and no token_ids"),
    "a token id that is a float": ("vllm", "t.json", changed("token_ids", [1.0]), "are not a list of whole numbers"),
    "a huge token id": ("vllm", "t.json", changed("token_ids", [10**20]), "its token ids hold a number beyond 64 bits"),
    "experts that are floats": (
        "vllm",
        "t.json",
        changed("routed_experts", npy(ONE.hidden_RLK.astype(np.float32))),
        "its experts are float32",
    ),
    "-1 as an unsigned number": (
        "vllm",
        "t.json",
        changed("routed_experts", npy(np.full(ONE.experts_RLK.shape, 2**64 - 1, np.uint64))),
        "token 0, layer 1: expert 18446744073709551615 is none of the layer's 8 experts",
    ),
    "beyond 64 bits": ("plain", "t.json", {"expert_ids": [[[10**30, 2], [3, 4]]]}, "its experts are"),
    "lists of several K": ("vllm", "t.json", changed("routed_experts", [[[1, 2], [3]]]), "are not of one length"),
    "no routing at all": (
        "vllm",
        "t.json",
        {"choices": [{"routed_experts": npy(np.zeros((0, HIDDEN, TOP_K), np.uint8))}]},
        "choice 0: has no row of routing",
    ),
    "tokens beyond any memory": ("sglang", "t.json", counted(10**12), "has 1000000000000 prompt_tokens"),
    "tokens beyond 64 bits": ("sglang", "t.json", counted(2, 10**30), "completion_tokens"),
    "an answer that begins behind its tokens": ("plain", "t.json", {**PLAIN, "generated_from": 9}, "begins at token 9"),
    "an answer that begins before them": ("plain", "t.json", {**PLAIN, "generated_from": -1}, "begins at token -1"),
    "more answer than tokens": (
        "slime",
        "t.pt",
        {"samples": [{"tokens": [1, 2], "rollout_routed_experts": [[[0, 0], [1, 2], [3, 4]]], "response_length": 9}]},
        "its answer begins at token -7, and it has 2",
    ),
    "half of a surrogate pair": ("plain", "t.json", {**PLAIN, "text": "\ud800"}, "its text holds half of a surrogate"),
    "half of one in a domain": ("plain", "t.json", {**PLAIN, "domain": "a\udfff"}, "its domain holds half of a"),
    "half of one in metadata": ("plain", "t.json", {**PLAIN, "metadata": {"\ud800": 1}}, "its metadata holds half of"),
    "weights that are all zero": (
        "plain",
        "t.json",
        {**PLAIN, "weights": [[[0, 0], [0, 0]]]},
        "every weight is 0. Leave",
    ),
    "weights beyond floats": (
        "plain",
        "t.json",
        {**PLAIN, "weights": [[[1e300, 1], [1, 1]]]},
        "a weight that is not a",
    ),
    "a mask that numbers sequences": (
        "verl",
        "t.pt",
        {
            "input_ids": torch.ones(1, 3, dtype=torch.int64),
            "attention_mask": torch.tensor([[1, 2, 2]]),
            "routed_experts": torch.ones(1, 3, HIDDEN, TOP_K, dtype=torch.int16),
        },
        "its attention_mask holds values other than 0 and 1",
    ),
    "NaN in metadata": (
        "plain",
        "t.json",
        {**PLAIN, "metadata": {"a": [float("nan")]}},
        "its metadata hold what JSON does not have",
    ),
    "a reference to routing": (
        "nemo-rl",
        "t.json",
        {"routed_experts": {"schema": "nemo_rl.routed_experts_ref.v1"}, "prompt_token_ids": [1]},
        "its routed_experts are an object, not a routing",
    ),
    "a padded batch without tokens": (
        "verl",
        "t.pt",
        {
            "input_ids": torch.zeros(2, 3, dtype=torch.int64),
            "attention_mask": torch.zeros(2, 3, dtype=torch.int64),
            "routed_experts": torch.zeros(2, 3, HIDDEN, TOP_K, dtype=torch.int16),
        },
        "there are no sequences",
    ),
    "an identifier that is a tensor": (
        "sglang-recorder",
        "t.pt",
        {**recorder_dump(TRACE), "records": [{**recorder_dump(TRACE)["records"][0], "forward_pass_id": torch.ones(2)}]},
        "its metadata hold what JSON does not have",
    ),
    "no positions": (
        "sglang-recorder",
        "t.pt",
        {**recorder_dump(TRACE), "records": [{**recorder_dump(TRACE)["records"][0], "positions": None}]},
        "its positions are not a list of whole numbers",
    ),
    "indices beyond 64 bits": (
        "megatron",
        "t.json",
        {"step": 0, "layer": 1, "num_tokens": 1, "topk": 2, "top_indices": [[1, 10**30]]},
        "its top_indices are object, not whole numbers",
    ),
    "a class of its own": ("slime", "t.pt", {"samples": [Path("a")]}, "it names pathlib."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answer_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    form, name, value, said = WRONG[case]
    require_refused(run_import(form, stored(tmp_path / name, value), model, tmp_path), said, tmp_path)


def recorded(array: Any) -> dict[str, Any]:
    dump = recorder_dump(TRACE)
    dump["records"][0]["topk_ids_of_layer"] = torch.tensor(array)
    return dump


def rollout(array: Any) -> dict[str, Any]:
    ids = torch.ones(2, 3, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "routed_experts": torch.tensor(array)}


MEGATRON = {"step": 0, "block": "decoder", "layer": 1, "num_tokens": 1, "topk": 2}
SHAPED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "vllm": ("t.json", lambda array: changed("routed_experts", npy(array))),
    "vllm, list": ("t.json", lambda array: changed("routed_experts", array.tolist())),
    "vllm, npz": ("t.npz", lambda array: {"0/routed_experts": array}),
    "plain": ("t.json", lambda array: {"expert_ids": array.tolist()}),
    "megatron": ("t.jsonl", lambda array: {**MEGATRON, "top_indices": array.tolist()}),
    "nemo-rl": ("t.json", lambda array: {"routed_experts": array.tolist(), "prompt_token_ids": [1]}),
    "slime": ("t.pt", lambda array: {"samples": [{"tokens": [1, 2], "rollout_routed_experts": array}]}),
    "verl": ("t.pt", rollout),
    "sglang-stat": ("t.pt", lambda array: {"logical_count": torch.tensor(array)}),
    "sglang-recorder": ("t.pt", recorded),
}
"""Format → a file's name, and what it holds where its routing is any array."""


@pytest.mark.parametrize("dimensions", [0, 1, 5])
@pytest.mark.parametrize("form", SHAPED)
def test_array_of_other_dimensions_is_refused(form: str, dimensions: int, model: Path, tmp_path: Path) -> None:
    name, shaped = SHAPED[form]
    files = stored(tmp_path / name, shaped(np.ones((1,) * dimensions, np.int64)))
    result = run_import(form.partition(",")[0], files, model, tmp_path)
    require_refused(result, f"{files[0]}", tmp_path)
    assert "dimensions" in result.output or (dimensions == 0 and "is int, not a list" in result.output)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "prompts"])
def test_batch_of_other_dimensions_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    (path,) = WRITERS["verl"][1](tmp_path, TRACE)
    fields = torch.load(path)
    torch.save({**fields, name: torch.ones(3, dtype=torch.int64)}, path)
    require_refused(run_import("verl", [path], model, tmp_path), f"{name}: has numbers of shape [3]", tmp_path)


@pytest.mark.parametrize(
    ("name", "column", "values", "said"),
    [
        ("layer_02", "scores", [0.5] * 30, "tokens from 0: has double, where lists of 2 numbers must be"),
        ("layer_02", "indices", [["a", "b"]] * 30, "has NULLs, or string, where numbers must be"),
        ("layer_02", "indices", [[1.0, 2.0]] * 30, "its experts are float64"),
        ("layer_02", "indices", [[1, 2, 3]] * 30, "has rows of other lengths than 2 experts"),
        ("000", "token_id", [[1]] * 10, "hold int32, list<element: int64> as token_id"),
        ("000", "token_id", [1.0] * 10, "its token ids are float64"),
        ("000", "token_id", [None] * 10, "has NULLs, or int32, where numbers must be"),
    ],
)
def test_columns_of_other_types_are_refused(
    name: str, column: str, values: list[Any], said: str, *, model: Path, tmp_path: Path
) -> None:
    """FLAME-MoE's files, one of them with other values in a column."""
    rng = np.random.default_rng(0)
    experts = np.tile(np.arange(TOP_K), (30, 2, 1))
    paths = write_flame(tmp_path, rng.integers(0, 200, 30), experts, rng.random((30, 2, TOP_K)).astype(np.float16))
    path = tmp_path / f"{name}.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array(values)), path)
    require_refused(run_import("flame-moe", paths, model, tmp_path), said, tmp_path)


@pytest.mark.parametrize("said", ["[1]", '{"num_experts": 1e400}', '{"num_experts": 8.5, "num_experts_per_token": 2}'])
def test_statistics_of_no_model_are_refused(said: str, model: Path, tmp_path: Path) -> None:
    (folder,) = write_tensorrt_llm(tmp_path, np.ones((2, 8), np.int64))
    (folder / "meta_info.json").write_text(said)
    require_refused(run_import("tensorrt-llm", [folder], model, tmp_path), "rank0.safetensors: ", tmp_path)


# ------------------------------------------------------------------------------------------ files


def two_files(folder: Path) -> Path:
    """A folder of two answers, in order of their names, and a hidden file."""
    folder.mkdir()
    for name, one in zip(("b.json", "a.json"), TRACE, strict=False):
        stored(folder / name, vllm_answer(one))
    (folder / ".hidden").write_text("no trace")
    return folder


def test_folder_is_its_files_by_name(model: Path, tmp_path: Path) -> None:
    folder = two_files(tmp_path / "answers")
    assert run_import("vllm", [folder], model, tmp_path).exit_code == 0
    assert rows_of(Layout(tmp_path / "wh")) == expected([TRACE[1], TRACE[0]])


def test_file_is_taken_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same rows are twice the load: of one file, whatever it is called."""
    folder = two_files(tmp_path / "answers")
    (tmp_path / "link.json").symlink_to(folder / "a.json")
    monkeypatch.chdir(tmp_path)
    for files in (["answers/a.json", "answers/a.json"], ["answers", "answers/a.json"]):
        require_refused(run_import("vllm", files, model, tmp_path), "a.json is given twice. Name it", tmp_path, 2)
    for other in ("link.json", str(folder / "a.json"), "answers/../answers/a.json"):
        result = run_import("vllm", ["answers/a.json", other], model, tmp_path)
        require_refused(result, f"{other} is given twice, also as answers/a.json. Name it once", tmp_path, 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("-", "- is not a file, and a trace is read more than once. Save it to a file."),
        ("/dev/null", "/dev/null is not a file, and a trace is read more than once"),
        ("answers/none.json", "there is no file answers/none.json"),
        ("empty", "empty holds no files"),
        ("nested", "nested holds the folder answers. Name each folder of the trace."),
        ("stray", "stray/notes.txt: its document is not JSON"),
    ],
)
def test_what_is_no_file_is_refused(
    name: str, said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "nested"):
        (tmp_path / folder).mkdir()
    two_files(tmp_path / "nested" / "answers")
    (two_files(tmp_path / "stray") / "notes.txt").write_text("my notes\n")
    code = 1 if name == "stray" else 2
    require_refused(run_import("vllm", [name], model, tmp_path), said, tmp_path, code)


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_name_that_is_no_text_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.json")
    stored(path, vllm_answer(ONE))
    result = run_import("vllm", [path], model, tmp_path)
    require_refused(result, "has a name that is not UTF-8", tmp_path, 2)


def test_suffix_may_be_in_capitals(model: Path, tmp_path: Path) -> None:
    for form, case, name in (("vllm", "vllm, npz", "OUT.NPZ"), ("plain", "plain, Parquet", "OUT.PARQUET")):
        root = tmp_path / form
        root.mkdir()
        (path,) = WRITERS[case][1](root, TRACE)
        assert run_import(form, [path.rename(root / name)], model, root).exit_code == 0
        assert rows_of(Layout(root / "wh")) == expected(TRACE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_routed_experts": 4}, "of the layer's 4 experts. Check --model."),
        ({"num_hidden_layers": 5}, "has 3 layers, but other has 5 layers, 4 of them with experts. Check --model."),
        ({"num_experts_per_tok": 3}, "has 2 experts per token, but other has 3. Check --model."),
        ({"vocab_size": 20}, "is outside the model's vocabulary (20 entries). Check --model."),
        ({"first_k_dense_replace": 2}, "has routing, and other has no experts there. Check --model."),
    ],
)
def test_other_model_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    other = config(tmp_path / "other", **changes)
    files = stored(tmp_path / "t.json", [vllm_answer(one) for one in TRACE])
    require_refused(run_import("vllm", files, other, tmp_path), said, tmp_path)


def test_other_format_is_refused(model: Path, tmp_path: Path) -> None:
    """Each format is given the files of each other: none of them is taken for its own."""
    makers: dict[str, Callable[[Path, list[Traced]], list[Path]]] = {
        form: write for form, write in WRITERS.values() if form != "megatron"
    }
    written = {}
    for form, write in makers.items():
        (tmp_path / form).mkdir()
        written[form] = write(tmp_path / form, TRACE)
    for form in makers:
        for other, files in written.items():
            if other != form:
                require_refused(run_import(form, files, model, tmp_path), str(files[0]), tmp_path)


def test_routing_at_any_depth(model: Path, tmp_path: Path) -> None:
    """NeMo's objects lie in others."""
    routed = base64.b64encode(ONE.experts_RLK.astype("<i2").tobytes()).decode()
    shape = "x".join(map(str, ONE.experts_RLK.shape))
    holder: Any = {
        "routed_experts": f"nrlre1:int16:{shape}:{routed}",
        "prompt_token_ids": ONE.ids_T[: ONE.prompt].tolist(),
        "generation_token_ids": ONE.ids_T[ONE.prompt :].tolist(),
    }
    for _ in range(200):
        holder = {"turns": [holder]}
    assert run_import("nemo-rl", stored(tmp_path / "t.json", holder), model, tmp_path).exit_code == 0
    assert rows_of(Layout(tmp_path / "wh")) == expected([ONE])


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("form", "key"), [("plain", "expert_ids"), ("plain", "domain"), ("sglang", "meta_info")])
def test_a_key_that_is_there_twice_is_refused(
    form: str, key: str, indent: int | None, model: Path, tmp_path: Path
) -> None:
    """One of its values would be lost without a word."""
    document = {**PLAIN, "domain": "a"} if form == "plain" else sglang_answer(ONE)
    written = json.dumps(document, indent=indent)
    doubled = written.replace(f'"{key}":', f'"{key}": {json.dumps(document[key])}, "{key}":', 1)
    (tmp_path / "t.json").write_text(doubled)
    require_refused(run_import(form, [tmp_path / "t.json"], model, tmp_path), f"has the key '{key}' twice", tmp_path)
