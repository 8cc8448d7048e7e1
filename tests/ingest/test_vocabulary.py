"""The text of every vocabulary entry: in bulk the same as one by one, for every class of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend

from moewh.cli.main import main
from moewh.ingest import demo
from moewh.ingest.prompts import vocabulary as bulk
from moewh.ingest.prompts.vocabulary import vocabulary_texts
from moewh.ingest.routing import TokenTexts
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from tests.support.models import byte_tokenizer, save_model
from tests.support.opened import viewed


class Words(PythonBackend):
    """A Python tokenizer with SentencePiece's mark for a space, and no word with a greater id."""

    words = ("\u2581the", "\u2581", "re", "<unk>", "\u2581caf\u00e9")

    @property
    def vocab_size(self) -> int:
        """How many words it knows."""
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        """Words by id."""
        return {word: vocab_id for vocab_id, word in enumerate(self.words)}

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """As SentencePiece does: the mark becomes a space, except in front."""
        return "".join(tokens).replace("\u2581", " ").lstrip(" ")


class Upper(PreTrainedTokenizerFast):
    """A fast tokenizer whose class overrides decoding."""

    def _decode(self, *args: Any, **kwargs: Any) -> str:
        return super()._decode(*args, **kwargs).upper()


class Broken(Words):
    """A tokenizer that fails on every one of its tokens."""

    def _convert_id_to_token(self, index: int) -> str:
        raise LookupError(index)


def made(kind: Any, **arguments: Any) -> PreTrainedTokenizerBase:
    """Make a tokenizer of a class of this module: those of transformers that it extends have no types."""
    tokenizer: PreTrainedTokenizerBase = kind(unk_token="<unk>", **arguments)
    return tokenizer


def metaspace() -> Tokenizer:
    words = ["<unk>", "\u2581the", "\u2581", "re", "<0xE2>", "\u2581caf\u00e9"]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def word_pieces() -> Tokenizer:
    words = ["[UNK]", "the", "##re", ".", "n't"]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def sparse() -> PreTrainedTokenizerBase:
    """Ids with gaps: the greatest exceeds their number."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))


def with_added() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["whole", " spaced "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


TOKENIZERS: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], bool]] = {
    "bytes": (byte_tokenizer, True),
    "added tokens": (with_added, True),
    "the demo's": (lambda: AutoTokenizer.from_pretrained(demo.checkpoint_path()), True),
    "SentencePiece": (lambda: PreTrainedTokenizerFast(tokenizer_object=metaspace(), unk_token="<unk>"), True),
    "WordPiece that cleans up": (
        lambda: PreTrainedTokenizerFast(tokenizer_object=word_pieces(), clean_up_tokenization_spaces=True),
        True,
    ),
    "ids with gaps": (sparse, True),
    "a fast class of its own": (lambda: made(Upper, tokenizer_object=metaspace()), False),
    "in Python": (lambda: made(Words), False),
    "ByT5": (ByT5Tokenizer, False),
}
"""Tokenizer, and whether its Rust part decodes for it."""


def alone(tokenizer: PreTrainedTokenizerBase, vocab_id: int) -> str:
    """Return a tokenizer's text for one entry, with the leading space that SentencePiece drops."""
    text = str(tokenizer.decode([vocab_id], clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(vocab_id)
    return f" {text}" if isinstance(piece, str) and piece[:1] == "\u2581" and text[:1] != " " else text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_in_bulk_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, in_rust = TOKENIZERS[name]
    tokenizer = make()
    known = max(tokenizer.get_vocab().values()) + 1
    asked: list[int] = []
    decode = bulk._decode

    def one_by_one(tokenizer: PreTrainedTokenizerBase, vocab_id: int, known: int) -> tuple[str | None, object]:
        asked.append(vocab_id)
        return decode(tokenizer, vocab_id, known)

    monkeypatch.setattr(bulk, "_decode", one_by_one)
    texts = vocabulary_texts(tokenizer).to_pylist()
    assert len(texts) == max(known, len(tokenizer))
    assert texts[:known] == [alone(tokenizer, vocab_id) for vocab_id in range(known)]
    assert (not asked) == in_rust
    assert vocabulary_texts(tokenizer, 3).to_pylist() == texts


def test_rows_of_the_embedding_that_are_no_tokens_have_no_text() -> None:
    assert vocabulary_texts(byte_tokenizer(), 300).to_pylist()[257:] == [""] * 43
    words = [" the", " ", "re", "<unk>", " caf\u00e9"]
    assert vocabulary_texts(made(Words), 8).to_pylist() == [*words, *[None] * 3]


def test_a_token_that_cannot_be_decoded_is_named() -> None:
    with pytest.raises(MoewhError, match=r"the tokenizer \(Broken\) cannot decode its token 0: .*--tokenizer"):
        vocabulary_texts(made(Broken))


def test_texts_of_tokens_are_looked_up() -> None:
    vocab_id_T = np.array([2, 0, 2], np.int32)
    assert TokenTexts(vocabulary_texts(made(Words)))(vocab_id_T).to_pylist() == ["re", " the", "re"]
    assert TokenTexts(None)(vocab_id_T).to_pylist() == [None] * 3


def test_a_run_holds_the_whole_vocabulary_of_its_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    arguments = ["--model", str(model), "--prompts", str(tmp_path / "p.txt"), "--warehouse", str(tmp_path / "wh")]
    assert CliRunner().invoke(main, ["ingest", *arguments, "--run-id", "r"]).exit_code == 0
    layout = Layout(tmp_path / "wh")
    rows = pq.read_table(layout.run("r") / schema.VOCABULARY.file, partitioning=None)
    texts = [alone(byte_tokenizer(), vocab_id) for vocab_id in range(257)]
    assert rows["vocab_id"].to_pylist() == list(range(len(rows)))
    assert rows["token"].to_pylist()[:257] == texts
    with viewed(layout) as connection:
        tokens = connection.execute("select vocab_id, token from tokens").fetchall()
        origin = connection.execute("select origin, origin_format from runs").fetchall()
    assert tokens
    assert all(token == texts[vocab_id] for vocab_id, token in tokens)
    assert origin == [("forward", None)]
