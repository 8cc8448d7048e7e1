"""`moewh.ingest` with models and prompts in memory: the same rows as from files, and identified weights."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import polars as pl
import pytest
import torch
from torch import nn

import moewh
from moewh.ingest.model import in_memory
from moewh.ingest.model.in_memory import fingerprint
from moewh.ingest.model.patches import patches
from moewh.warehouse.errors import MoewhError, UsageError
from tests.support.models import DEVICE, byte_tokenizer, save_model, tiny_model

RECORDS: list[Any] = [
    {"text": "The quick brown fox", "domain": "prose", "source": "book", "page": 7},
    {"text": "def f(x): return x", "domain": "code"},
    {"input_ids": np.array([0, 5, 6, 7])},
    "a plain text",
]
ROWS = "select token_id, layer, rank, expert, weight from routing where run_id = $run order by all"


def routing(warehouse: Path, run: str) -> list[tuple[Any, ...]]:
    return moewh.open(warehouse).sql(ROWS, run=run).fetchall()


def test_a_model_and_prompts_in_memory_give_the_rows_of_their_files(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps(record if isinstance(record, dict) else {"text": record}, default=np.ndarray.tolist) + "\n"
            for record in RECORDS
        )
    )
    wh = tmp_path / "wh"
    moewh.ingest(str(folder), path, wh, "files")
    moewh.ingest(folder, iter(RECORDS), wh, "records")
    moewh.ingest(tiny_model("olmoe"), [path], wh, "memory", tokenizer=byte_tokenizer())
    summary = moewh.ingest(tiny_model("olmoe"), RECORDS, wh, "both", tokenizer=byte_tokenizer())
    assert len(summary.written) == 1
    assert routing(wh, "files") != []
    for run in ("records", "memory", "both"):
        assert routing(wh, run) == routing(wh, "files")
    asked = "select text, domain, source, metadata from prompts where run_id = 'both' order by prompt_id"
    assert moewh.open(wh).sql(asked).fetchall()[:2] == [
        ("The quick brown fox", "prose", "book", '{"page":7}'),
        ("def f(x): return x", "code", "records", None),
    ]
    assert moewh.ingest(tiny_model("olmoe"), RECORDS, wh, "both", tokenizer=byte_tokenizer()).written == []
    assert moewh.open(wh).verify() == []


def test_generation_in_memory_is_that_of_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.repetition_penalty = 5.0  # must have no effect, as in a folder's generation_config.json
    for name, given in (("files", {"model": folder}), ("memory", {"model": model, "tokenizer": byte_tokenizer()})):
        moewh.ingest(prompts=RECORDS, warehouse=tmp_path / "wh", run_id=name, generate=5, **given)
    assert routing(tmp_path / "wh", "memory") == routing(tmp_path / "wh", "files") != []
    assert model.generation_config.repetition_penalty == 5.0


def _change_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] += 1e-3


def _change_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq[0] *= 2


def _change_setting(model: Any) -> None:
    model.model.layers[1].mlp.gate.norm_topk_prob = True


def _swap_class(model: Any) -> None:
    model.model.norm = nn.RMSNorm(32)


@pytest.mark.parametrize("change", [_change_weight, _change_buffer, _change_setting, _swap_class])
def test_changed_weights_never_pass_for_their_base(change: Callable[[Any], None], tmp_path: Path) -> None:
    base, changed = tiny_model("olmoe"), tiny_model("olmoe")
    assert fingerprint(base) == fingerprint(changed)
    change(changed)
    assert fingerprint(base) != fingerprint(changed)
    if change is _change_weight:
        moewh.ingest(base, RECORDS, tmp_path, "run", tokenizer=byte_tokenizer())
        with pytest.raises(MoewhError, match="'run' exists and is another run: weights_sha256 was"):
            moewh.ingest(changed, RECORDS, tmp_path, "run", tokenizer=byte_tokenizer())


def _steer(_module: Any, _args: Any, output: Any) -> Any:
    return output + 1.0


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(_steer)


def _pre_hook(model: Any) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)


def _replace(model: Any) -> None:
    block = model.model.layers[0].mlp
    whole = block.forward
    block.forward = lambda hidden: whole(hidden) + 1.0


class _Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> Any:
        return 2 * self.inner(hidden)


def _module(model: Any) -> None:
    model.model.norm = _Doubled(model.model.norm)


@pytest.mark.parametrize(
    ("patch", "line"),
    [
        (_hook, f"model.layers.0.mlp: hook {__name__}._steer"),
        (_pre_hook, f"model.layers.0: pre-hook {__name__}._pre_hook.<locals>.<lambda>"),
        (_replace, f"model.layers.0.mlp: forward {__name__}._replace.<locals>.<lambda>"),
        (_module, f"model.norm: module {__name__}._Doubled"),
    ],
)
def test_a_patched_model_passes_for_no_other(patch: Callable[[Any], None], line: str, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    assert patches(model) == ()
    patch(model)
    assert patches(model) == (line,)
    if patch is _hook:  # the same hook again may add another number
        moewh.ingest(model, RECORDS, tmp_path, "run", tokenizer=byte_tokenizer())
        stored = moewh.open(tmp_path).sql("select options from runs").fetchall()[0][0]
        assert json.loads(stored)["patches"] == [line]
        with pytest.raises(MoewhError, match="'run' exists and is another run"):
            moewh.ingest(model, RECORDS, tmp_path, "run", tokenizer=byte_tokenizer())


def test_a_tensor_is_hashed_whole_whatever_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_memory, "_HASHED_BYTES", 7)
    tensors = [
        torch.arange(12.0).reshape(3, 4),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.tensor([1.5, -2], dtype=torch.bfloat16)[1],
        torch.tensor([True, False]),
        torch.zeros(0),
    ]
    for tensor in tensors:
        numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        expected = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + numbers).hexdigest()
        assert in_memory._tensor_digest(tensor.to(DEVICE)) == expected


def test_a_class_that_was_patched_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    kind = type(model.model.layers[0].mlp)
    whole = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden: whole(self, hidden) + 1.0)
    assert len(patches(model)) == 3
    assert "layers.0.mlp: forward of its class" in patches(model)[0]


def _numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return list(state[1].tolist())


def test_the_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("olmoe").train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    rope = model.model.rotary_emb.inv_freq
    settings = model.generation_config
    states = (torch.get_rng_state(), random.getstate(), _numpy_state())
    moewh.ingest(model, RECORDS, tmp_path, "run", tokenizer=byte_tokenizer(), generate=2)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.model.rotary_emb.inv_freq is rope
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), _numpy_state()) == states[1:]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()


def test_a_lora_model_is_recorded_with_its_adapter(tmp_path: Path) -> None:
    def adapted() -> Any:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("olmoe"), config)

    model = adapted()
    moewh.ingest(model, RECORDS, tmp_path, "adapted", tokenizer=byte_tokenizer())
    moewh.ingest(tiny_model("olmoe"), RECORDS, tmp_path, "base", tokenizer=byte_tokenizer())
    merged = adapted().merge_and_unload()
    moewh.ingest(merged, RECORDS, tmp_path, "merged", tokenizer=byte_tokenizer())
    weights = {run: np.array([row[4] for row in routing(tmp_path, run)]) for run in ("adapted", "base", "merged")}
    assert (
        np.abs(weights["adapted"] - weights["merged"]).max() < 1e-5 < np.abs(weights["adapted"] - weights["base"]).max()
    )
    with model.disable_adapter():
        off = fingerprint(model.get_base_model())
    assert off != fingerprint(model.get_base_model())


def _dynamic(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_modules_hold_otherwise_are_part_of_the_digest_or_refused() -> None:
    class Scaled(nn.Linear):
        scale = torch.ones(1)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}scale"] = self.scale

    model = tiny_model("olmoe")
    plain = fingerprint(model)
    model.model.layers[1].self_attn.q_proj.__class__ = Scaled
    one = fingerprint(model)
    Scaled.scale = torch.full((1,), 2.0)
    assert len({plain, one, fingerprint(model)}) == 3
    with pytest.raises(MoewhError, match=r"q_proj\._packed_params keeps its weights packed"):
        fingerprint(_dynamic(tiny_model("olmoe")))


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "a model in memory needs its tokenizer, and none was given"),
        ({"tokenizer": "gpt2"}, "the tokenizer is a str. Give a loaded one"),
        ({"dtype": "float32"}, "dtype is for a model loaded from files, and this one is in memory"),
        ({"max_lenght": 3}, "ingest has no option 'max_lenght'. They are allow_pickle, "),
        ({"model": nn.Linear(2, 2)}, "the model is a Linear"),
        ({"prompts": {"text": ["a"]}}, "prompts are a dict"),
        ({"prompts": [7]}, "record 1 of the prompts is a int"),
        ({"prompts": [[5, 6]]}, r"record 1 of the prompts is a list. Give strings or dicts, such as .*'input_ids'"),
        ({"prompts": CHAT}, r"record 1 has no 'text', .* A chat is one record, {'messages'"),
        ({"prompts": [CHAT]}, "record 1 of the prompts is a list. Give strings or dicts, such as {'messages'"),
        ({"prompts": "The cat sat."}, "there is no prompts file The cat sat.. .* in Python into a list"),
        ({"prompts": io.StringIO('{"text": "a"}')}, "prompts are an open file"),
        ({"prompts": ["a", {"text": "b", "x": object()}]}, "record 2 of the prompts cannot be stored as JSON"),
        ({"prompts": []}, "there are no prompts in records"),
        ({"prompts": [{"txt": "a"}]}, "records: record 1 has no 'text'"),
        ({"prompts": None}, "no prompts were named"),
    ],
)
def test_what_cannot_be_ingested_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    is_refused(changes, message, tmp_path)


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    is_refused({"model": torch.compile(nn.Linear(2, 2))}, "the model is compiled", tmp_path)


def is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Show that ingest refuses the changed arguments in one line, and writes nothing."""
    arguments = {"model": tiny_model("olmoe"), "prompts": RECORDS, "tokenizer": byte_tokenizer(), **changes}
    with pytest.raises((MoewhError, UsageError), match=message) as refused:
        moewh.ingest(warehouse=tmp_path / "wh", **arguments)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "wh").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 1.0}, r"limit is 1\.0\. Give a whole number"),
        ({"limit": "1"}, "limit is '1'. Give a whole number"),
        ({"limit": True}, r"limit is True\. Give a whole number\.$"),
        ({"max_length": 5.5}, r"max_length is 5\.5"),
        ({"train_step": 2**70}, "Give a whole number of at most"),
        ({"temperature": "0.5", "generate": 1}, "temperature is '0.5'. Give a number"),
        ({"router_logits": "false"}, "router_logits is 'false'. Give True or False"),
        ({"special_tokens": 1}, "special_tokens is 1. Give True or False"),
        ({"domain": 5}, "domain is 5, which is not text"),
        ({"series": "a\ud800"}, "series is 'a.ud800', which is not text"),
        ({"hidden_states": 0.5}, r"hidden_states is 0\.5. Give a whole number"),
        ({"chat_arguments": {"a": 1}}, "chat_arguments is .* Give a list of texts"),
        ({"run_id": 5}, "run id 5 is not allowed"),
        ({"warehouse": None}, "the warehouse is None. Give a path or a URL"),
        ({"warehouse": b"wh"}, "the warehouse is b'wh'"),
        ({"warehouse": ""}, "the warehouse is ''"),
        ({"prompts": {"b", "a"}}, "prompts are a set, which has no order"),
        ({"prompts": b"text"}, "prompts are a bytes. Give a path, or a list of records"),
        ({"prompts": pl.DataFrame({"text": ["a"]})}, r"prompts are a DataFrame.*to_dicts\(\)"),
        ({"prompts": [__file__]}, r"names of files that exist. Give each as a pathlib\.Path"),
        ({"prompts": ""}, "a name given to prompts is empty"),
    ],
)
def test_an_argument_of_another_type_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"model": None, "prompts": RECORDS, "warehouse": tmp_path / "wh", **options}
    with pytest.raises(UsageError, match=message) as refused:
        moewh.ingest("demo", **{name: value for name, value in arguments.items() if name != "model"})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "wh").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"model": "no\nmodel"},
        {"prompts": "no\nfile"},
        {"prompts": [Path("no\nfile.jsonl")]},
        {"prompts": None, "dataset": "no\ndata"},
        {"tokenizer": "no\ntokenizer"},
        {"chat_template": "{% for message in messages %}\n{% endfor %}"},
        {"revision": "no\nrevision"},
        {"device": "no\ndevice"},
        {"dtype": "no\ndtype"},
        {"hidden_states": "no\nlayer"},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_an_error_is_one_line_whatever_was_given(options: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"model": "demo", "prompts": RECORDS, "warehouse": tmp_path / "wh", **options}
    with pytest.raises(MoewhError) as refused:
        moewh.ingest(**arguments)
    assert "\n" not in str(refused.value)


def test_a_stream_is_read_as_far_as_the_limit(tmp_path: Path) -> None:
    """Such as a dataset that is streamed: it may be too large to read, or endless. A time that is missing is null."""
    taken = []

    def stream() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            taken.append(number)
            yield {"text": f"text {number}", "at": pd.NaT}

    moewh.ingest(tiny_model("olmoe"), stream(), tmp_path, "r", tokenizer=byte_tokenizer(), limit=3)
    rows = moewh.open(tmp_path).sql("select text, metadata from prompts order by prompt_id").fetchall()
    assert rows == [(f"text {number}", '{"at":null}') for number in range(3)]
    assert taken == [0, 1, 2]


def test_numbers_and_records_of_other_libraries_are_what_they_say(tmp_path: Path) -> None:
    """numpy's numbers; pandas' records, where NaN is a missing value; times and paths in metadata."""
    frame = pd.DataFrame({"text": ["a", "b", None], "domain": ["x", np.nan, "y"], "at": pd.Timestamp("2024-05-06")})
    records = [{**record, "file": Path("a/b")} for record in frame.to_dict("records")]
    options = {"limit": np.int64(3), "max_length": np.int32(9), "hidden_states": [0], "router_logits": np.bool_(True)}
    moewh.ingest(tiny_model("olmoe"), records, tmp_path, "r", tokenizer=byte_tokenizer(), **options)
    warehouse = moewh.open(tmp_path)
    rows = warehouse.sql("select text, domain, status, metadata from prompts order by prompt_id").fetchall()
    packed = '{"at":"2024-05-06 00:00:00","file":"a/b"}'
    assert rows == [("a", "x", "ok", packed), ("b", None, "ok", packed), ("", "y", "empty", packed)]
    assert warehouse.sql("select distinct layer from hidden_states").fetchall() == [(0,)]
    assert warehouse.sql("select $n + 1, $many", n=np.float32(0.5), many=[1, 2]).fetchall() == [(1.5, [1, 2])]
    for ids in ([0, 1], (0, 1), np.array([0, 1]), "0,1"):
        found = warehouse.query("co_routing_where", prompt_ids=ids).fetchall()
        assert found and found == warehouse.query("co_routing_where").fetchall()
    assert warehouse.sql("select $sql || $name || $self", sql="a", name="b", self="c").fetchall() == [("abc",)]


# ------------------------------------------------------------------------------------- messages name arguments


def _saved_without_tokenizer(folder: Path) -> Path:
    saved = save_model(folder / "model")
    for path in (*saved.glob("token*"), *saved.glob("*.jinja")):
        path.unlink()
    return saved


def _file(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def _ingested(folder: Path) -> moewh.Warehouse:
    moewh.ingest("demo", ["a"], folder / "wh", "r")
    return moewh.open(folder / "wh")


DOORS: dict[str, Callable[[Path], Any]] = {
    "max_length is 0": lambda at: moewh.ingest("demo", ["a"], at / "wh", max_length=0),
    "generate 1000000 leaves no room": lambda at: moewh.ingest("demo", ["a"], at / "wh", generate=10**6),
    "Raise max_length or choose on_overflow": lambda at: moewh.ingest(
        "demo", ["a b c d"], at / "wh", max_length=2, on_overflow="error"
    ),
    "path given to prompts": lambda at: moewh.ingest("demo", at / "none.txt", at / "wh"),
    "Name the column with text_column": lambda at: moewh.ingest(
        "demo", _file(at, "p.jsonl", '{"a": "b"}\n'), at / "wh"
    ),
    "or give prompts_format": lambda at: moewh.ingest("demo", _file(at, "p.dat", "a"), at / "wh"),
    "path given to model": lambda at: moewh.ingest(at / "none", ["a"], at / "wh"),
    "tokenizer with tokenizer": lambda at: moewh.ingest(_saved_without_tokenizer(at), ["a"], at / "wh"),
    "device nowhere": lambda at: moewh.ingest("demo", ["a"], at / "wh", device="nowhere"),
    "dtype float4": lambda at: moewh.ingest("demo", ["a"], at / "wh", dtype="float4"),
    "chat_arguments 'x'": lambda at: moewh.ingest("demo", ["a"], at / "wh", chat_arguments=["x"]),
    "Choose another run_id": lambda at: [moewh.ingest("demo", [text], at / "wh", "r") for text in ("a", "b")],
    "hidden_states 99": lambda at: moewh.ingest("demo", ["a"], at / "wh", hidden_states=99),
    "or name another with path": moewh.open,
    "Add token=VALUE": lambda at: _ingested(at).query("token_experts"),
    " layer=x: layer is": lambda at: _ingested(at).query("expert_top_tokens", layer="x", expert=0),
    "directory with warehouse": lambda _: moewh.Writer("/proc/wh", "r", "m", layers=[0], num_experts=2, top_k=1).write(
        None, [[[0]]]
    ),
}
"""What a message names, and the call that raises it."""


@pytest.mark.parametrize("named", DOORS)
def test_messages_name_arguments_of_python(named: str, tmp_path: Path) -> None:
    with pytest.raises(MoewhError) as raised:
        DOORS[named](tmp_path)
    message = str(raised.value)
    assert named in f" {message}"
    assert not re.search(r"(^|\s)(--|-p )", re.sub("`[^`]*`", "", message)), message


def test_warnings_name_arguments_of_python(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^temperature without generate: nothing is generated\.$"):
        moewh.ingest("demo", ["a"], tmp_path / "wh", temperature=1.0)
