"""From the prompts of one segment to its tokens, and the contexts in which the model sees them.

A context is what the model is fed as one sequence: a whole prompt, or one window of a chunked one.
The tokens of a segment lie in one flat array of T, prompt after prompt, context after context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ingest.options import Overflow
from ingest.readers import INPUT_IDS, MESSAGES
from warehouse.errors import MoewhError
from warehouse.schema import POSITION_BITS

KINDS = ("prompt", "special", "generated")
"""Values of tokens.kind."""
_TEXTS_AT_ONCE = 1_024


@dataclass(frozen=True)
class TokenRules:
    """The options that decide which tokens a prompt becomes. Lengths in tokens."""

    max_length: int
    on_overflow: Overflow
    special_tokens: bool


@dataclass(frozen=True)
class TokenisedSegment:
    """The tokens of one segment's prompts: P prompts, T tokens, C contexts."""

    prompts: pa.Table
    """[P] with the canonical columns, as they were read."""
    text_P: list[str]
    """As tokenised: messages after the chat template, token ids decoded."""
    first_prompt: int
    status_P: list[str]
    num_tokens_P: npt.NDArray[np.int64]
    prompt_T: npt.NDArray[np.int64]
    """prompt_id of each token."""
    position_T: npt.NDArray[np.int32]
    context_T: npt.NDArray[np.int32]
    vocab_id_T: npt.NDArray[np.int32]
    special_T: npt.NDArray[np.bool_]
    start_C: npt.NDArray[np.int64]
    """Where each context begins in the flat arrays."""
    length_C: npt.NDArray[np.int64]
    generated_T: npt.NDArray[np.bool_] | None = None
    """Tokens that the model itself said; None if it said nothing."""

    @property
    def kind_T(self) -> npt.NDArray[np.int8]:
        """What each token is, as a place in KINDS."""
        kind_T = self.special_T.astype(np.int8)
        if self.generated_T is not None:
            kind_T[self.generated_T] = KINDS.index("generated")
        return kind_T

    @property
    def token_id_T(self) -> npt.NDArray[np.int64]:
        """prompt_id * 2**24 + position."""
        return (self.prompt_T << POSITION_BITS) + self.position_T


@dataclass(frozen=True)
class _Encoded:
    """One prompt after the tokenizer: its contexts as lists of ids, each with its mask of special tokens."""

    status: str
    contexts: list[list[int]]
    special: list[list[int]]


class _Tokenizer:
    """Turns prompts of any form into ids and masks of special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._special_ids = frozenset(tokenizer.all_special_ids)

    def as_text(self, form: str, payload: str, name: str) -> str:
        """Return a prompt as the text that is tokenised. Raises MoewhError for messages without a template."""
        if form == MESSAGES:
            if not self._tokenizer.chat_template:
                raise MoewhError(
                    f"{name} is chat messages, but the tokenizer has no chat template. Give a text column."
                )
            try:
                return str(self._tokenizer.apply_chat_template(json.loads(payload), tokenize=False))
            except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
                raise MoewhError(f"{name}: the chat template refuses its messages: {error}") from error
        if form == INPUT_IDS:
            return str(self._tokenizer.decode(self._ids(payload, name), clean_up_tokenization_spaces=False))
        return payload

    def encode(self, forms: list[str], payloads: list[str], texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Return (ids, mask of special tokens) per prompt.

        The template has put its special tokens into a chat's text already, so none are added to it again. In chats
        and given ids, a special token is one the tokenizer lists as such.
        """
        encoded: dict[int, tuple[list[int], list[int]]] = {}
        for form, special_tokens in (("text", self._special_tokens), (MESSAGES, False)):
            places = [place for place, kind in enumerate(forms) if kind == form]
            if not places:
                continue
            output = self._tokenizer(
                [texts[place] for place in places],
                add_special_tokens=special_tokens,
                return_special_tokens_mask=True,
                return_attention_mask=False,
                verbose=False,
            )
            pairs = zip(output["input_ids"], output["special_tokens_mask"], strict=True)
            for place, (ids, mask) in zip(places, pairs, strict=True):
                encoded[place] = (ids, mask if form == "text" else self._mask(ids))
        for place, form in enumerate(forms):
            if form == INPUT_IDS:
                ids = json.loads(payloads[place])
                encoded[place] = (ids, self._mask(ids))
        return [encoded[place] for place in range(len(forms))]

    def _mask(self, ids: list[int]) -> list[int]:
        return [int(token in self._special_ids) for token in ids]

    def _ids(self, payload: str, name: str) -> list[int]:
        ids = json.loads(payload)
        wrong = [token for token in ids if type(token) is not int or not 0 <= token < len(self._tokenizer)]
        if wrong:
            raise MoewhError(f"{name}: {wrong[0]} among its input_ids is no token of the tokenizer.")
        return list(ids)


def tokenise(
    prompts: pa.Table,
    first_prompt: int,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    too_large: Sequence[int] = (),
) -> TokenisedSegment:
    """Tokenise the prompts of a segment.

    `too_large` lists prompts (by place in the segment) that are `failed` unread: their rows would not fit a
    segment. Raises MoewhError, naming the prompt, for an overflow with the rule `error`.
    """
    turn = _Tokenizer(tokenizer, rules.special_tokens)
    payloads, forms = prompts.column("text").to_pylist(), prompts.column("form").to_pylist()
    names = [f"prompt {first_prompt + place}" for place in range(len(payloads))]
    texts = [turn.as_text(*parts) for parts in zip(forms, payloads, names, strict=True)]
    encoded: list[_Encoded] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = slice(start, start + _TEXTS_AT_ONCE)
        pairs = turn.encode(forms[part], payloads[part], texts[part])
        encoded += [_fit(ids, mask, rules, name) for (ids, mask), name in zip(pairs, names[part], strict=True)]
    for place in too_large:
        encoded[place] = _Encoded("failed", [], [])
    return _flatten(prompts, texts, first_prompt, encoded)


def _fit(ids: list[int], special: list[int], rules: TokenRules, name: str) -> _Encoded:
    """Apply the overflow rule to one prompt."""
    if len(ids) == sum(special):
        return _Encoded("empty", [], [])
    if len(ids) <= rules.max_length:
        return _Encoded("ok", [ids], [special])
    if rules.on_overflow == "error":
        raise MoewhError(
            f"{name} has {len(ids)} tokens, over the maximum length {rules.max_length}. "
            "Raise --max-length or choose --on-overflow truncate, chunk or skip."
        )
    if rules.on_overflow == "skip":
        return _Encoded("skipped", [], [])
    windows = _windows(ids, special, rules.max_length, name)
    if rules.on_overflow == "truncate":
        return _Encoded("truncated", [windows[0][0]], [windows[0][1]])
    if sum(len(window) for window, _ in windows) > 1 << POSITION_BITS:
        return _Encoded("failed", [], [])
    return _Encoded("chunked", [window for window, _ in windows], [mask for _, mask in windows])


def _windows(ids: list[int], special: list[int], max_length: int, name: str) -> list[tuple[list[int], list[int]]]:
    """Cut a prompt into consecutive windows, each with the special tokens the tokenizer puts around a text."""
    content = [place for place, flag in enumerate(special) if not flag]
    first, last = content[0], content[-1] + 1
    before, body, after = ids[:first], list(zip(ids[first:last], special[first:last], strict=True)), ids[last:]
    step = max_length - len(before) - len(after)
    if step < 1:
        raise MoewhError(
            f"{name} cannot fit: the maximum length {max_length} leaves no room beside "
            f"{len(before) + len(after)} special tokens. Raise --max-length or give --no-special-tokens."
        )
    windows = []
    for start in range(0, len(body), step):
        part = body[start : start + step]
        mask = [1] * len(before) + [flag for _, flag in part] + [1] * len(after)
        windows.append((before + [token for token, _ in part] + after, mask))
    return windows


def _flatten(prompts: pa.Table, texts: list[str], first_prompt: int, encoded: list[_Encoded]) -> TokenisedSegment:
    contexts = [(place, number) for place, item in enumerate(encoded) for number in range(len(item.contexts))]
    ids = [encoded[place].contexts[number] for place, number in contexts]
    masks = [encoded[place].special[number] for place, number in contexts]
    length_C = np.array([len(window) for window in ids], np.int64)
    num_tokens_P = np.array([sum(map(len, item.contexts)) for item in encoded], np.int64)
    prompt_start_P = np.cumsum(num_tokens_P) - num_tokens_P
    tokens = int(num_tokens_P.sum())
    return TokenisedSegment(
        prompts=prompts,
        text_P=texts,
        first_prompt=first_prompt,
        status_P=[item.status for item in encoded],
        num_tokens_P=num_tokens_P,
        prompt_T=np.repeat(np.arange(first_prompt, first_prompt + len(encoded), dtype=np.int64), num_tokens_P),
        position_T=(np.arange(tokens) - np.repeat(prompt_start_P, num_tokens_P)).astype(np.int32),
        context_T=np.repeat(np.array([number for _, number in contexts], np.int32), length_C),
        vocab_id_T=np.fromiter((token for window in ids for token in window), np.int32, tokens),
        special_T=np.fromiter((flag for mask in masks for flag in mask), np.bool_, tokens),
        start_C=np.cumsum(length_C) - length_C,
        length_C=length_C,
    )


class TokenTexts:
    """Vocabulary ids decoded one by one, each at most once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, vocab_id_T: npt.NDArray[np.int32]) -> pa.Array:
        """Return the text of each token, as an Arrow dictionary array of T strings.

        A token that is only part of a character decodes to U+FFFD.
        """
        distinct, index_T = np.unique(vocab_id_T, return_inverse=True)
        texts = [self._text(int(vocab_id)) for vocab_id in distinct]
        return pa.DictionaryArray.from_arrays(pa.array(index_T, pa.int32()), pa.array(texts, pa.string()))

    def _text(self, vocab_id: int) -> str:
        if vocab_id not in self._texts:
            text = str(self._tokenizer.decode([vocab_id], clean_up_tokenization_spaces=False))
            piece = self._tokenizer.convert_ids_to_tokens(vocab_id)
            # SentencePiece marks a leading space with U+2581 and drops it when it decodes a piece alone.
            if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
                text = " " + text
            self._texts[vocab_id] = text
        return self._texts[vocab_id]


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything in a tokenizer that decides the ids it gives."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    parts = (type(tokenizer).__name__, rules, special, json.dumps(tokenizer.chat_template))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
