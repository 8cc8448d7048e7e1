"""The texts of a tokenizer's vocabulary, with each entry decoded separately, all in one pass.

In: a tokenizer, and the number of rows of the model's embedding. Out: [V] Arrow strings by vocab_id, stored in the
run's own files (`RunRecord.vocabulary`) and used for the text of each token (`moewh.ingest.routing.TokenTexts`).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from moewh.warehouse.errors import MoewhError, short_message

_SPACE = "\u2581"
"""SentencePiece's mark for a leading space, which it drops when it decodes a single piece."""
_DECODERS = ("decode", "_decode", "convert_ids_to_tokens")
"""Methods of a fast tokenizer that its Rust part implements, unless a class overrides them."""


def vocabulary_texts(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> pa.Array:
    """Return the text of every vocabulary entry: [V] strings, V the tokenizer's ids or the embedding's rows.

    A token that is only part of a character decodes to U+FFFD. An embedding row without a token has the text that the
    tokenizer gives for it, or NULL if it gives none. Raises MoewhError, with the id, for a token that the tokenizer
    cannot decode.
    """
    known = known_entries(tokenizer)
    size = max(known, rows or 0)
    if _decodes_in_rust(tokenizer):
        texts: Sequence[str | None] = tokenizer.backend_tokenizer.decode_batch(
            [[vocab_id] for vocab_id in range(size)], skip_special_tokens=False
        )
        pieces: Sequence[object] = tokenizer.convert_ids_to_tokens(list(range(size)))
    else:
        decoded = [_decode(tokenizer, vocab_id, known) for vocab_id in range(size)]
        texts, pieces = [text for text, _ in decoded], [piece for _, piece in decoded]
    return pa.array(map(_with_space, texts, pieces), pa.string())


def known_entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of ids that a tokenizer has, which may be fewer than the rows of the model's embedding."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def _decodes_in_rust(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer decodes exactly like the Rust tokenizer that it wraps."""
    kind = type(tokenizer)
    return issubclass(kind, TokenizersBackend) and all(
        getattr(kind, name) is getattr(TokenizersBackend, name) for name in _DECODERS
    )


def _decode(tokenizer: PreTrainedTokenizerBase, vocab_id: int, known: int) -> tuple[str | None, object]:
    """Return an entry's text and its piece, from the tokenizer's own methods."""
    try:
        text = str(tokenizer.decode([vocab_id], clean_up_tokenization_spaces=False))
        return text, tokenizer.convert_ids_to_tokens(vocab_id)
    except Exception as error:  # a tokenizer may be anyone's code
        if vocab_id >= known:
            return None, None
        raise MoewhError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot decode its token {vocab_id}: {short_message(error)}. "
            "Check its files, or name another with --tokenizer."
        ) from error


def _with_space(text: str | None, piece: object) -> str | None:
    """Return the text with the leading space that its piece marks."""
    if text is not None and isinstance(piece, str) and piece.startswith(_SPACE) and not text.startswith(" "):
        return f" {text}"
    return text
