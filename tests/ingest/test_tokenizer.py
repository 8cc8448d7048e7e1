"""Tokenizers: every class without its files is refused; --tokenizer gives another; silent settings have no effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import PythonBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from moewh.cli.main import main
from moewh.ingest.model.tokenizer import TokenizerSource, load_tokenizer
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build
from tests.support.models import byte_tokenizer, save_model
from tests.support.opened import viewed

CLASSES = sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name})
BYTE_LEVEL = {"ByT5Tokenizer", "CanineTokenizer", "DiaTokenizer", "PerceiverTokenizer"}
"""Classes whose vocabulary is in their code."""


def source(folder: Path) -> TokenizerSource:
    return TokenizerSource(str(folder), "tiny", None, trust_remote_code=False)


def declare(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    return folder


def run(warehouse: Path, model: Path, prompts: Path, *more: str) -> Result:
    arguments = ["ingest", "--model", str(model), "--prompts", str(prompts), "--warehouse", str(warehouse), *more]
    return CliRunner().invoke(main, arguments)


def line_of(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.stderr
    line, *rest = result.stderr.splitlines()
    assert rest == []
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    return path


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_without_its_files_is_refused(name: str, tmp_path: Path) -> None:
    folder = declare(tmp_path / "m", name)
    if name in BYTE_LEVEL:
        assert load_tokenizer(source(folder))("hello")["input_ids"]
        return
    with pytest.raises(MoewhError, match="tiny") as refused:
        load_tokenizer(source(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in BYTE_LEVEL])
def test_every_class_with_broken_files_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = declare(tmp_path / "m", name)
    for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model"):
        (folder / file).write_bytes(b"\x00\xff{")
    with pytest.raises(MoewhError, match="tiny") as refused:
        load_tokenizer(source(folder))
    assert "\n" not in str(refused.value)


def two_files(name: str) -> dict[str, str]:
    """Names of a class's vocabulary and merges, if it has both."""
    try:
        files: dict[str, str] = getattr(tokenizer_class_from_name(name), "vocab_files_names", {})
    except ImportError:
        return {}
    return {key: files[key] for key in ("vocab_file", "merges_file") if {"vocab_file", "merges_file"} <= set(files)}


def test_a_vocabulary_without_its_merges_is_refused_and_merges_without_a_vocabulary(tmp_path: Path) -> None:
    """One alone would give single characters, the other nothing."""
    classes = {name: files for name in CLASSES if (files := two_files(name))}
    assert len(classes) > 15
    for name, files in classes.items():
        for left, content in (("vocab_file", '{"a": 0, "b": 1, "ab": 2, "<unk>": 3}'), ("merges_file", "a b\n")):
            folder = declare(tmp_path / f"{name}-{left}", name)
            (folder / files[left]).write_text(content)
            with pytest.raises(MoewhError, match="tiny"):
                load_tokenizer(source(folder))


def test_a_checkpoint_without_tokenizer_is_refused_and_another_can_be_named(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(model, tmp_path / "tiny")
    (bare / "tokenizer.json").unlink()
    for left in ("settings only", "nothing"):
        assert "--tokenizer ID_OR_PATH" in line_of(run(tmp_path / "wh", bare, prompts)), left
        assert not (tmp_path / "wh").exists()
        (bare / "tokenizer_config.json").unlink(missing_ok=True)
    only = tmp_path / "only"
    byte_tokenizer().save_pretrained(only)
    assert run(tmp_path / "wh", bare, prompts, "--tokenizer", str(only), "--run-id", "a").exit_code == 0
    assert run(tmp_path / "wh", model, prompts, "--run-id", "b").exit_code == 0
    connection = viewed(Layout(tmp_path / "wh"))
    rows = connection.execute("select run_id, identity, tokens_key from runs order by run_id").fetchall()
    assert rows[0][1:] == rows[1][1:], "the same tokenizer by another way is the same run"
    other = byte_tokenizer()
    other.add_tokens(["one"])
    other.save_pretrained(only)
    says = line_of(run(tmp_path / "wh", bare, prompts, "--tokenizer", str(only), "--run-id", "a"))
    assert "tokenizer_sha256 was " in says


@pytest.mark.parametrize(
    ("named", "says", "code"),
    [
        ("./nowhere", "there is no folder ./nowhere. Check the path given to --tokenizer", 2),
        ("empty", "lacks the files of its tokenizer", 1),
        ("p.jsonl", "is a file. Name the folder", 2),
        ("nobody/none", "cannot load the tokenizer of nobody/none", 1),
    ],
)
def test_unusable_tokenizer(*, named: str, says: str, code: int, model: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = tmp_path / named
    given = str(path) if path.exists() else named
    assert says in line_of(run(tmp_path / "wh", model, prompts, "--tokenizer", given), code).replace(str(path), named)
    assert not (tmp_path / "wh").exists()


def test_truncation_and_padding_saved_with_a_tokenizer_change_nothing(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    cut = shutil.copytree(model, tmp_path / "tiny")
    rules = json.loads((cut / "tokenizer.json").read_text())
    rules["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    rules["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    (cut / "tokenizer.json").write_text(json.dumps(rules))
    settings = json.loads((cut / "tokenizer_config.json").read_text())
    (cut / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 2}))
    assert run(tmp_path / "wh", model, prompts, "--run-id", "a").exit_code == 0
    assert run(tmp_path / "wh", cut, prompts, "--run-id", "b").exit_code == 0
    query = "select token_id, vocab_id, kind from tokens where run_id = ? order by token_id"
    connection = viewed(Layout(tmp_path / "wh"))
    assert connection.execute(query, ["a"]).fetchall() == connection.execute(query, ["b"]).fetchall() != []


class Slow(PythonBackend):
    """A Python tokenizer of characters, with <s> in front, which its mask of special tokens ignores."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        self._vocabulary = {"<s>": 0, **{chr(number): number for number in range(1, 128)}}
        settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>") | settings
        PythonBackend.__init__(self, **settings)

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """Return {character: id}."""
        return dict(self._vocabulary)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocabulary[token]

    def _convert_id_to_token(self, index: int) -> str:
        return {number: char for char, number in self._vocabulary.items()}[index]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        """Put <s> in front."""
        del token_ids_1
        return [0, *token_ids_0]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Return a mask that is one too short."""
        del token_ids_1, already_has_special_tokens
        return [0] * len(token_ids_0)


class Tensors(Slow):
    """Always returns tensors."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Return a tensor for each text."""
        output = super().__call__(*args, **settings)
        return {name: [torch.tensor(row) for row in rows] for name, rows in output.items()}


class Maskless(Slow):
    """Returns no mask of special tokens."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Return only ids."""
        return {"input_ids": super().__call__(*args, **settings)["input_ids"]}


class Failing(Slow):
    """Cannot tokenise."""

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        raise RuntimeError(f"no\nroom for {text}")


@pytest.mark.parametrize("kind", [Slow, Tensors, Maskless])
def test_slow_tokenizers_give_their_tokens(
    kind: type, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moewh.ingest.model.tokenizer.AutoTokenizer.from_pretrained", lambda *_, **__: kind())
    result = run(tmp_path / "wh", model, prompts)
    assert result.exit_code == 0, result.stderr
    rows = viewed(Layout(tmp_path / "wh")).execute("select vocab_id, kind from tokens order by token_id")
    expected = [row for text in ("one", "two") for row in [(0, "special"), *((ord(char), "prompt") for char in text)]]
    assert rows.fetchall() == expected


def test_a_tokenizer_that_fails_is_named(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moewh.ingest.model.tokenizer.AutoTokenizer.from_pretrained", lambda *_, **__: Failing())
    says = line_of(run(tmp_path / "wh", model, prompts))
    assert "prompt 0 to 1: the tokenizer (Failing) fails: no room for one" in says
    assert not (tmp_path / "wh").exists()


def dropping(model: Path, folder: Path) -> Path:
    """A model whose tokenizer drops everything but letters, as a normaliser may."""
    shutil.copytree(model, folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[^a-z]"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return folder


def test_a_text_without_tokens_is_failed_and_an_empty_one_is_empty(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    texts = ["one", "", "123", "   ", "\u200b"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = run(tmp_path / "wh", dropping(model, tmp_path / "tiny"), path)
    assert result.exit_code == 0, result.stderr
    assert "prompts that are not empty give no tokens and are marked failed: 2, 3, 4." in result.stderr
    rows = viewed(Layout(tmp_path / "wh")).execute("select status, num_tokens from prompts order by prompt_id")
    assert rows.fetchall() == [("ok", 4), ("empty", 0), ("failed", 0), ("failed", 0), ("failed", 0)]


def test_a_run_that_gives_no_tokens_at_all_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *(["1 2 3"] * 300)]))
    folder = dropping(model, tmp_path / "tiny")
    for more in ((), ("--segment-rows", "500"), ("--generate", "2")):
        says = line_of(run(tmp_path / "wh", folder, path, *more))
        assert "none of the 300 non-empty prompts gives any token (first: prompt 1)" in says
        assert not (tmp_path / "wh").exists()
    path.write_text(path.read_text() + '{"text": "last"}\n')
    assert run(tmp_path / "wh", folder, path, "--segment-rows", "500").exit_code == 0


@pytest.mark.parametrize(
    ("prompt", "token"), [({"text": "all of it, extra"}, 257), ({"input_ids": [1, 2, 258]}, 258)], ids=["text", "ids"]
)
@pytest.mark.parametrize("more", [(), ("--generate", "2")], ids=["prompts", "generated"])
def test_token_ids_without_a_row_of_the_embedding_are_named(
    prompt: dict[str, Any], token: int, more: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "tiny")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["extra", "more"])
    tokenizer.save_pretrained(folder)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(prompt) + "\n")
    says = line_of(run(tmp_path / "wh", folder, path, *more))
    assert f"prompt 1: token id {token} is outside the model's vocabulary (257 rows)" in says
    assert not (tmp_path / "wh").exists()


def test_a_pad_token_without_a_row_pads_with_another(model: Path, prompts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "tiny")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    prompts.write_text('{"text": "one"}\n{"text": "longer than one"}\n')
    for name, kind in (("a", model), ("b", folder)):
        assert run(tmp_path / "wh", kind, prompts, "--run-id", name).exit_code == 0
    query = "select token_id, layer, rank, expert, weight from routing where run_id = ? order by all"
    connection = viewed(Layout(tmp_path / "wh"))
    assert connection.execute(query, ["a"]).fetchall() == connection.execute(query, ["b"]).fetchall() != []


def test_a_decoder_that_would_start_from_no_token_is_named(prompts: Path, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "switch_transformers")
    model = build(family)
    model.generation_config.decoder_start_token_id = 99_999
    model.save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    says = line_of(run(tmp_path / "wh", tmp_path / "tiny", prompts, "--generate", "2"))
    assert "decoder_start_token_id 99999 is outside the model's vocabulary" in says
    assert not (tmp_path / "wh").exists()
