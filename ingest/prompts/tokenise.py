"""From the prompts of one segment to its tokens, and the contexts in which the model sees them.

A context is one input sequence of the model: a whole prompt, or one window of a chunked one. The tokens of a segment
form one flat array of T, in order of prompts and contexts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from moewh.ingest.options import Overflow
from moewh.ingest.prompts.chats import ChatRenderer, ChatRules
from moewh.ingest.prompts.records import INPUT_IDS, MESSAGES
from moewh.ingest.routing import TokenisedSegment
from moewh.warehouse.errors import MoewhError, short_message
from moewh.warehouse.files.schema import POSITION_BITS

_TEXTS_AT_ONCE = 1_024


@dataclass(frozen=True)
class TokenRules:
    """The options that decide which tokens a prompt becomes. Lengths in tokens."""

    max_length: int
    on_overflow: Overflow
    special_tokens: bool
    chats: ChatRules = field(default_factory=ChatRules)
    vocabulary: int | None = None
    """Rows of the model's embedding; token ids must be below this. None allows any id."""


@dataclass(frozen=True)
class _Encoded:
    """One prompt after the tokenizer: its contexts as lists of ids, each with its mask of special tokens."""

    status: str
    contexts: list[list[int]]
    special: list[list[int]]


@dataclass(frozen=True)
class _Prompt:
    """One prompt before tokenisation: as text, or as given ids."""

    name: str
    form: str
    text: str
    """As tokenised: messages after the chat template, token ids decoded."""
    blank: bool
    """Whether it is `empty`, rather than `failed`, if it has no tokens but special ones."""
    ids: list[int] | None = None


class _Tokenizer:
    """Turns prompts of any form into ids and masks of special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: TokenRules, warn: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = rules.special_tokens
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._chats = ChatRenderer(tokenizer, rules.chats, warn)
        self._warn = warn
        self._doubled = False

    def read(self, form: str, payload: str, name: str) -> _Prompt:
        """Return a prompt as text or as given ids. Raises MoewhError, with its name, if it is neither."""
        if form == MESSAGES:
            text = self._chats.text(payload, name)
            return _Prompt(name, form, text, blank=not text)
        if form == INPUT_IDS:
            given, ids = _given_ids(payload, name)
            wrong = [token for token in ids if type(token) is not int or not 0 <= token < len(self._tokenizer)]
            if wrong:
                raise MoewhError(f"{name}: {wrong[0]} among its input_ids is not a token of the tokenizer.")
            text = str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            return _Prompt(name, form, text, blank=bool(ids) or not given, ids=ids)
        return _Prompt(name, form, payload, blank=not payload)

    def encode(self, prompts: list[_Prompt]) -> list[tuple[list[int], list[int]]]:
        """Return (ids, mask of special tokens) per prompt.

        The template has already put its special tokens into a chat's text, so none are added. In chats and given ids,
        the special tokens are those that the tokenizer lists as special.
        """
        encoded: dict[int, tuple[list[int], list[int]]] = {}
        for form, special_tokens in (("text", self._special_tokens), (MESSAGES, False)):
            indices = [index for index, prompt in enumerate(prompts) if prompt.form == form]
            pairs = self._encode_texts([prompts[index] for index in indices], special_tokens) if indices else []
            for index, (ids, mask) in zip(indices, pairs, strict=True):
                encoded[index] = (ids, mask if form == "text" and len(mask) == len(ids) else self._mask(ids))
        for index, prompt in enumerate(prompts):
            if prompt.ids is not None:
                encoded[index] = (prompt.ids, self._mask(prompt.ids))
        return [encoded[index] for index in range(len(prompts))]

    def _encode_texts(self, prompts: list[_Prompt], special_tokens: bool) -> list[tuple[list[int], list[int]]]:
        """Tokenise whole texts, ignoring the tokenizer's own padding and truncation settings.

        A Python tokenizer may give no mask, or one that leaves out the tokens it added.
        """
        try:
            output = self._tokenizer(
                [prompt.text for prompt in prompts],
                add_special_tokens=special_tokens,
                padding=False,
                truncation=False,
                return_special_tokens_mask=True,
                return_attention_mask=False,
                verbose=False,
            )
            ids = [_plain(tokens) for tokens in output["input_ids"]]
            masks = output.get("special_tokens_mask")
            masks = [[]] * len(ids) if masks is None else [_plain(mask) for mask in masks]
            return [pair for pair, _ in zip(zip(ids, masks, strict=True), prompts, strict=True)]
        except Exception as error:  # a tokenizer may be arbitrary code
            last = f" to {prompts[-1].name.removeprefix('prompt ')}" if len(prompts) > 1 else ""
            raise MoewhError(
                f"{prompts[0].name}{last}: the tokenizer ({type(self._tokenizer).__name__}) fails: "
                f"{short_message(error)}. Check its files, or name another with --tokenizer."
            ) from error

    def warn_of_doubled(self, prompts: list[_Prompt], encoded: list[tuple[list[int], list[int]]]) -> None:
        """Warn once about a text that already begins with the special token that the tokenizer adds in front."""
        for prompt, (ids, mask) in zip(prompts, encoded, strict=True):
            if not self._doubled and prompt.form == "text" and ids[1:2] == ids[:1] != [] and mask[:2] == [1, 0]:
                self._doubled = True
                self._warn(
                    f"{prompt.name} begins with {self._tokenizer.decode(ids[:1])}, and the tokenizer puts another in "
                    "front. Give --no-special-tokens if the texts hold their special tokens already."
                )

    def _mask(self, ids: list[int]) -> list[int]:
        return [int(token in self._special_ids) for token in ids]


def _plain(values: Any) -> list[int]:
    """Return a list or one-dimensional tensor as a list."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _given_ids(payload: str, name: str) -> tuple[int, list[Any]]:
    """Return how many ids were given, and the ids that remain after applying the attention mask, if any.

    Raises MoewhError for a mask that does not fit, or that has a gap: tokens there would be neither seen nor absent.
    """
    given = json.loads(payload)
    ids, mask = (given["input_ids"], given.get("attention_mask")) if isinstance(given, dict) else (given, None)
    if mask is None:
        return len(ids), list(ids)
    if not isinstance(mask, list) or any(type(flag) not in (int, bool) or flag not in (0, 1) for flag in mask):
        raise MoewhError(f"{name}: its attention_mask holds values other than 0 and 1.")
    if len(mask) != len(ids):
        raise MoewhError(f"{name}: its attention_mask has {len(mask)} values for {len(ids)} input_ids.")
    real = [index for index, flag in enumerate(mask) if flag]
    if not real:
        return len(ids), []
    first, last = real[0], real[-1] + 1
    if len(real) < last - first:
        gap = mask.index(0, first)
        raise MoewhError(
            f"{name}: its attention_mask masks position {gap}, between tokens. Only padding before or after the tokens "
            "can be masked."
        )
    return len(ids), list(ids[first:last])


def tokenise(
    prompts: pa.Table,
    first_prompt: int,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    too_large: Sequence[int] = (),
    *,
    warn: Callable[[str], None] = lambda _: None,
) -> TokenisedSegment:
    """Tokenise the prompts of a segment.

    `too_large` lists prompts (by index in the segment) that are marked `failed` unread, because their rows would not
    fit in a segment. `warn` receives a message for content that a chat template leaves out. Raises MoewhError, with the
    prompt's name, for one that cannot be tokenised, for a token id outside the model's vocabulary, and for an overflow
    with the rule `error`.
    """
    turn = _Tokenizer(tokenizer, rules, warn)
    payloads, forms = prompts.column("text").to_pylist(), prompts.column("form").to_pylist()
    names = [f"prompt {first_prompt + index}" for index in range(len(payloads))]
    read = [turn.read(*parts) for parts in zip(forms, payloads, names, strict=True)]
    encoded: list[_Encoded] = []
    for start in range(0, len(read), _TEXTS_AT_ONCE):
        part = read[start : start + _TEXTS_AT_ONCE]
        pairs = turn.encode(part)
        encoded += [_fit(ids, mask, rules, prompt) for (ids, mask), prompt in zip(pairs, part, strict=True)]
        turn.warn_of_doubled(part, pairs)
    without_tokens = tuple(first_prompt + index for index, item in enumerate(encoded) if item is _NO_TOKENS)
    for index in too_large:
        encoded[index] = _Encoded("failed", [], [])
    flat = _flatten(prompts, [prompt.text for prompt in read], first_prompt, encoded)
    return replace(flat, without_tokens=without_tokens)


_NO_TOKENS = _Encoded("failed", [], [])
"""The result for a non-empty prompt that gives no tokens."""


def _fit(ids: list[int], special: list[int], rules: TokenRules, prompt: _Prompt) -> _Encoded:
    """Apply the overflow rule to one prompt. Raises MoewhError for an id outside the model's vocabulary."""
    if len(ids) == sum(special):
        return _Encoded("empty", [], []) if prompt.blank else _NO_TOKENS
    fitted = _Encoded("ok", [ids], [special])
    if len(ids) > rules.max_length:
        fitted = _overflow(ids, special, rules, prompt.name)
    if rules.vocabulary is not None:
        wrong = [token for window in fitted.contexts for token in window if not 0 <= token < rules.vocabulary]
        if wrong:
            raise MoewhError(
                f"{prompt.name}: token id {wrong[0]} is outside the model's vocabulary ({rules.vocabulary:,} rows). "
                "Resize the embeddings or use the model's own tokenizer."
            )
    return fitted


def _overflow(ids: list[int], special: list[int], rules: TokenRules, name: str) -> _Encoded:
    """Apply the overflow rule to a prompt that is too long. Raises MoewhError if the rule is `error`."""
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
    """Cut a prompt into consecutive windows, each with the special tokens that the tokenizer puts around a text."""
    content = [index for index, flag in enumerate(special) if not flag]
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
    contexts = [(index, number) for index, item in enumerate(encoded) for number in range(len(item.contexts))]
    ids = [encoded[index].contexts[number] for index, number in contexts]
    masks = [encoded[index].special[number] for index, number in contexts]
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


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything in a tokenizer that affects the ids it gives."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    parts = [type(tokenizer).__name__, rules, special, json.dumps(tokenizer.chat_template)]
    if getattr(tokenizer, "split_special_tokens", False):
        parts.append("split_special_tokens")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
