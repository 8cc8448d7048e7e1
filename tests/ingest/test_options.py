"""An ingest option is one field, from which command line, identity and the command that restores a run are derived."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import click
import pytest
import torch

import moewh
from moewh.cli.ingest import ingest, ingest_parameters
from moewh.ingest import identity, run
from moewh.ingest.options import (
    IngestOptions,
    Option,
    choices_of,
    command_words,
    each_checkpoint,
    option,
    option_of,
    shaping_options,
)
from moewh.ingest.prompts import sources, stream
from moewh.ingest.prompts.chats import ChatRules, chat_arguments
from moewh.ingest.prompts.stream import PromptPlan
from moewh.ingest.prompts.tokenise import TokenRules
from moewh.ingest.record import Identity
from moewh.ingest.recorder.arguments import as_arguments
from moewh.ingest.run import Progress
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout

NO_SHAPE: dict[str, Any] = {
    "batch_tokens": 5,
    "device": "cpu",
    "series": "s",
    "train_step": 4,
    "train_tokens": 9,
    "domain": "d",
    "delimiter": ";",
    "allow_pickle": True,
    "trust_remote_code": True,
    "tokenizer": "x",
}
MANY: dict[str, Any] = {
    "limit": 7,
    "max_length": 20,
    "generate": 3,
    "temperature": 1.5,
    "seed": 9,
    "router_logits": True,
    "hidden_states": "all",
    "special_tokens": False,
    "on_overflow": "skip",
    "segment_rows": 12,
    "chat_arguments": ("n=null",),
}
NEWER: dict[str, Any] = {"expert_outputs": True}
"""Options added after the identities of MANY, which stay the same."""
IDENTITIES: list[tuple[dict[str, Any], str]] = [
    ({}, "72b7cc7ac6a1904bf8db349911c467910cb64d6e7baa8109a5cf5e7a04b49997"),
    ({"max_length": 100}, "9e2d62ec58366c6c743f2c2f1ea3c374257b29240a6fda84dfb4e66f0925408f"),
    ({"limit": 7}, "956cc7b98b0bb11971e4d5edcd6b7341645ba3904ac25ea73a94a601b39eb51c"),
    ({"on_overflow": "chunk"}, "aaf67245fe555f0da95726c35305a44ba5b64c781d59f81d17b3fa8b3e81a7c7"),
    ({"special_tokens": False}, "84324c7aabf9ab195c4cd72c1539d7ad042d009a17ae2324b7b67836d57a2dd4"),
    ({"segment_rows": 1000}, "63306e027623f5644aa6c00b4b9a273f31a378887a842f5851fededa1f49d9d0"),
    ({"generate": 5}, "492f20714eaf01153be258a70ae9cda95d9dd63ba8480308b93a4742b85e02a9"),
    ({"temperature": 0.5}, "f8396f59027d6d931d1725d046f8deb99591963658c6caf07b531a9db3b72faa"),
    ({"seed": 3}, "dd4bab127b7da05cdc3f2518eff8fd548d6259f86780a177a6891ad3d9c4e20b"),
    ({"router_logits": True}, "23e99abfa9f4dc2c7da6358356abe2c2f0699af7f1e654d106695099873e81d4"),
    ({"hidden_states": "0,5"}, "5fbab137f510175bcae1202a8aaa31d92438e0dc446c082a4ee47ecfc954d6e9"),
    ({"chat_arguments": ("b=1", "a=x")}, "912147b6e89876d0d7afa089f0eb263e00d2531161df4ccef83f6e71050a14bb"),
    (NEWER, "f6f17f3aca13d4e4896f9d2d5d1fde749b6ecaef63d9ec05194cc6826722b56d"),
    (NO_SHAPE, "72b7cc7ac6a1904bf8db349911c467910cb64d6e7baa8109a5cf5e7a04b49997"),
    (MANY, "840a24f784255e3038efc51fca41f92b4109e63f5fd6e853707c0b53e246fb52"),
]
"""Options with the sha256 of their identity, which must never change: runs begun by an older moewh are completed."""


def identity_of(options: IngestOptions, monkeypatch: pytest.MonkeyPatch) -> Identity:
    """The identity of a run of a made-up model, in which nothing depends on the versions of libraries."""
    monkeypatch.setattr(identity, "config_sha256", lambda _: "c")
    monkeypatch.setattr(identity, "tokenizer_sha256", lambda _: "t")
    loaded: Any = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="sdpa", _experts_implementation="eager"),
        source=SimpleNamespace(name="m", title="org/m", checkpoint="step1"),
        weights_sha256="w",
        commit=None,
        tokenizer=None,
        model=SimpleNamespace(dtype=torch.bfloat16),
        generation_tokens=None,
        patches=None,
    )
    chats = ChatRules(chat_arguments(options.chat_arguments), bool(options.generate))
    rules = TokenRules(options.max_length or 64, options.on_overflow, options.special_tokens, chats)
    return identity.identify(loaded, options, rules, PromptPlan(3, "p", (0,)))


@pytest.mark.parametrize(("options", "sha256"), IDENTITIES, ids=lambda value: ",".join(value) or "none")
def test_identity_is_what_it_always_was(options: dict[str, Any], sha256: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity_of(IngestOptions("m", ("p",), **options), monkeypatch).sha256 == sha256


def test_every_option_that_shapes_rows_is_in_the_table() -> None:
    shaping = {one.name for one in fields(IngestOptions) if option_of(one).shapes != "no"}
    assert shaping - {"dtype"} <= {*MANY, *NEWER}  # the identity has the dtype of the loaded model
    assert not shaping & NO_SHAPE.keys()


def parsed(*words: str) -> IngestOptions:
    """The options of one run, as the command line gives them."""
    given = ["--model", "m", "--prompts", "p", *words]
    context = ingest.make_context("ingest", given, help_option_names=["-h", "--help"])  # which click keeps for later
    (options,) = each_checkpoint(**{name: value for name, value in context.params.items() if name != "warehouse"})
    return options


def test_command_line_has_the_defaults_of_the_fields() -> None:
    assert parsed() == IngestOptions("m", ("p",))


def test_every_field_is_an_option_in_the_same_order() -> None:
    given = [(made.name, made.opts) for made in ingest_parameters()]
    names = {"model": "models", "revision": "revisions"}
    assert given == [(names.get(one.name, one.name), [option_of(one).flag]) for one in fields(IngestOptions)]
    shown = [made.opts[-1] for made in ingest.get_params(click.Context(ingest, help_option_names=["-h", "--help"]))]
    assert shown == [flags[0] for _, flags in given] + ["--warehouse", "--help"]


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--no-special-tokens"], {"special_tokens": False}),
        (["--router-logits"], {"router_logits": True}),
        (["--delimiter", "tab"], {"delimiter": "\t"}),
        (["--delimiter", ";"], {"delimiter": ";"}),
        (["--on-overflow", "skip", "--prompts-format", "tsv"], {"on_overflow": "skip", "prompts_format": "tsv"}),
        (["--temperature", "1"], {"temperature": 1.0}),
        (["--chat-argument", "a=1", "--chat-argument", "b=x"], {"chat_arguments": ("a=1", "b=x")}),
        (["--revision", "step4", "--run-id", "r"], {"revision": "step4", "run_id": "r"}),
    ],
)
def test_words_become_values(words: list[str], changes: dict[str, Any]) -> None:
    assert parsed(*words) == replace(IngestOptions("m", ("p",)), **changes)


@pytest.mark.parametrize("options", [options for options, _ in IDENTITIES], ids=lambda value: ",".join(value) or "none")
def test_words_of_an_identity_give_that_identity(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity_of(IngestOptions("m", ("p",), **options), monkeypatch)
    words = command_words(json.loads(first.json))
    assert identity_of(parsed(*words), monkeypatch).sha256 == first.sha256
    assert words[words.index("--dtype") + 1] == "bfloat16"


def test_text_that_looks_like_json_stays_text_in_the_words() -> None:
    arguments = {"a": "1", "b": 1, "c": "it's", "d": None}
    words = command_words({"chat_arguments": arguments})
    assert chat_arguments(tuple(words[1::2])) == arguments


def test_an_option_that_was_not_given_leaves_the_identity_as_it_is() -> None:
    assert "chat_arguments" not in shaping_options(IngestOptions("m", ("p",)), {})
    assert shaping_options(IngestOptions("m", ("p",), limit=3), {"max_length": 9})["max_length"] == 9


@pytest.mark.parametrize("name", [one.name for one in fields(IngestOptions)])
def test_no_option_takes_what_it_has_no_meaning_for(name: str, tmp_path: Path) -> None:
    """Python passes what the command line refuses: None, an empty text, and a choice that does not exist."""
    one = next(one for one in fields(IngestOptions) if one.name == name)
    hint = get_type_hints(IngestOptions)[name]
    given: dict[str, Any] = {
        "model": "m",
        "prompts": ("p",),
        **({"dataset": "d"} if name in ("config", "split") else {}),
    }
    if "str" in str(hint) and "tuple" not in str(hint) and name not in ("model", "tokenizer"):
        with pytest.raises(UsageError, match=r"is empty|is not allowed|Give one ASCII|Use "):
            IngestOptions(**{**given, name: ""})
    if choices_of(hint, option_of(one)):
        with pytest.raises(UsageError, match=f"^{option_of(one).flag} is 'x'. Use "):
            IngestOptions(**{**given, name: "x"})
    if "None" not in str(hint) and name not in ("model", "prompts", "run_id"):
        with pytest.raises(UsageError, match=f"^{name} is None. Give a value, or leave it out."):
            moewh.ingest("m", ["a"], tmp_path, **{name: None})


NUMBERS = {one.name: option_of(one) for one in fields(IngestOptions) if option_of(one).least is not None}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 2**63, 10**30, float("nan")])
def test_a_number_out_of_range_is_refused_by_its_flag(name: str, value: float) -> None:
    if name == "temperature" and value > 0:
        return
    options: dict[str, Any] = {name: value}
    limit = "at most 9,223,372,036,854,775,807" if value > 0 else "at least "
    with pytest.raises(UsageError, match=f"^{NUMBERS[name].flag} is {value}. Give a .* number of {limit}"):
        IngestOptions("m", ("p",), **options)


def test_a_column_beside_the_domain_of_every_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="--domain-column has no effect"):
        IngestOptions("m", ("p",), domain="d", domain_column="kind")
    IngestOptions("m", ("p",), domain="d")
    IngestOptions("m", ("p",), domain_column="kind")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"generate": 2}, None),
        ({"generate": 2, "temperature": 0.5, "seed": 3}, None),
        ({"temperature": 0.5}, "--temperature without --generate"),
        ({"seed": 3}, "--seed without --generate"),
        ({"temperature": 0.5, "seed": 3}, "--temperature and --seed without --generate"),
        ({"generate": 2, "seed": 3}, "--seed without --temperature"),
    ],
)
def test_options_of_generation_that_do_nothing_are_named(options: dict[str, Any], said: str | None) -> None:
    found = IngestOptions("m", ("p",), **options).without_effect
    assert found is None if said is None else str(found).startswith(said)


def test_an_option_that_does_nothing_gives_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    progress = Progress(warn=warnings.append)
    options = IngestOptions("demo", ("demo",), limit=1, temperature=0.5)
    run.ingest(options, Layout(tmp_path / "wh"), progress)
    assert warnings == [options.without_effect]


NO_TOKENS = {
    "dtype",
    "limit",
    "segment_rows",
    "generate",
    "temperature",
    "seed",
    "router_logits",
    "hidden_states",
    *NEWER,
}
"""Options that shape rows and not the tokens of a prompt (those generated are covered by the whole identity)."""


def test_every_option_that_decides_tokens_is_in_the_tokens_key() -> None:
    shaping = {one.name for one in fields(IngestOptions) if option_of(one).shapes != "no"}
    names = ("prompts_sha256", "tokenizer_sha256", "max_length", "on_overflow", "special_tokens")
    known = dict.fromkeys(names, "x")
    for name in sorted(shaping - NO_TOKENS):
        changed = Identity({**known, name: "y"}, "r")
        assert changed.tokens_key != Identity(known, "r").tokens_key, f"{name}: of_tokens, or above?"


def test_every_option_that_prompts_are_read_by_names_what_was_read(tmp_path: Path) -> None:
    """What a command has read is kept for the next one under the values of these options."""
    folder = Path(sources.__file__).parent
    code = "".join((folder / file).read_text() for file in ("sources.py", "stream.py"))
    inputs = {"prompts", "dataset", "config", "split", "prompts_format"}
    used = set(re.findall(r"options\.(\w+)", code)) & {one.name for one in fields(IngestOptions)} - inputs
    assert used == {one.name for one in fields(IngestOptions) if option_of(one).of_input}
    (tmp_path / "p.csv").write_text("text\nhello\n")
    (given,) = sources.find_inputs(IngestOptions("m", (str(tmp_path / "p.csv"),))).inputs
    changes: list[dict[str, Any]] = [{}, *({name: 3 if name == "limit" else "x"} for name in used)]
    keys = {stream._input_key([given], IngestOptions("m", ("p",), **changed)) for changed in changes}
    assert len(keys) == 1 + len(used)


def test_an_option_is_given_where_it_differs_from_its_default() -> None:
    @dataclass(frozen=True)
    class More(IngestOptions):
        padded: bool = option(True, Option("--no-padding", "No padding.", shapes="if given"))
        share: float = option(0.5, Option("--share", "A share.", shapes="if given"))
        words: tuple[str, ...] = option((), Option("--word", "A word.", shapes="if given"))

    asked: dict[str, Any] = {"model": "m", "prompts": ("p",)}
    names = {"padded", "share", "words"}
    assert not names & shaping_options(More(**asked), {}).keys()
    given = shaping_options(More(**asked, padded=False, share=0.0, words=("a", "b")), {})
    assert {name: given[name] for name in names} == {"padded": False, "share": 0.0, "words": ("a", "b")}


# ------------------------------------------------------------------------------ what Python's users read


@pytest.mark.parametrize("one", fields(IngestOptions), ids=lambda one: one.name)
def test_python_is_given_the_argument_of_an_option(one: Any) -> None:
    """Also where the command shows its value; commands and what only looks like the option stay."""
    declared = option_of(one)
    name = f"{one.name}={not one.default}" if isinstance(one.default, bool) else one.name
    shown = f"Give {declared.flag}, {declared.flag} {declared.metavar}, or run `moewh ingest {declared.flag} x`."
    with pytest.raises(UsageError) as raised, as_arguments():
        raise UsageError(f"{shown} Not x{declared.flag}, {declared.flag}-more.")
    expected = f"Give {name}, {name}, or run `moewh ingest {declared.flag} x`."
    assert str(raised.value) == f"{expected} Not x{declared.flag}, {declared.flag}-more."
