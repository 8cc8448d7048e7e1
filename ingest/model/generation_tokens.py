"""The tokens that end a model's generation and, for an encoder-decoder, the one that its decoder starts from.

Nothing else is taken from generation_config.json. Its other settings (penalties, suppressed tokens, beams, sampling)
are ignored: only `--temperature` shapes the output.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from moewh.ingest.model.repository import Repository
from moewh.warehouse.errors import MoewhError

_REMEDY = "Correct it, or leave --generate out."
_START_NAMES = ("decoder_start_token_id", "bos_token_id")
_INNER_CONFIGS = ("decoder", "generator", "text_config")
"""Nested configurations where transformers looks for values that the outer one does not set."""


@dataclass(frozen=True)
class GenerationTokens:
    """Token ids that end and start a model's generation."""

    end_ids: tuple[int, ...]
    """Any of these ends a sequence; without one, it runs to its full length."""
    start_id: int | None
    """The decoder's first token; None for a model without an encoder."""


@dataclass(frozen=True)
class StatedTokens:
    """These tokens as a model's files state them."""

    used: GenerationTokens
    otherwise: GenerationTokens
    """The tokens without generation_config.json, which no other digest of a local model covers."""

    @property
    def shaping(self) -> dict[str, Any]:
        """Return what generation_config.json changes, as part of a run's identity; empty if it changes nothing."""
        named = {
            "end_tokens": (list(self.used.end_ids), list(self.otherwise.end_ids)),
            "decoder_start_token": (self.used.start_id, self.otherwise.start_id),
        }
        return {name: used for name, (used, otherwise) in named.items() if used != otherwise}


def read_generation_tokens(files: Repository, tokenizer: PreTrainedTokenizerBase, config: Any) -> StatedTokens:
    """Read the tokens from generation_config.json, else from config.json; a missing end token is the tokenizer's.

    Raises MoewhError if a file is not a JSON object or holds a value that is not a token id.
    """
    settings = _read(files, CONFIG_NAME) or {}
    inner = next((part for name in _INNER_CONFIGS if isinstance(part := settings.get(name), dict)), {})
    configured = {**inner, **{name: value for name, value in settings.items() if value is not None}}
    otherwise = _tokens(files, CONFIG_NAME, configured, tokenizer, config)
    stated = _read(files, GENERATION_CONFIG_NAME)
    used = otherwise if stated is None else _tokens(files, GENERATION_CONFIG_NAME, stated, tokenizer, config)
    return StatedTokens(used, otherwise)


def _tokens(
    files: Repository, name: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: Any
) -> GenerationTokens:
    ends = stated_ends(settings.get("eos_token_id"), tokenizer)
    start = next((settings[name] for name in _START_NAMES if settings.get(name) is not None), None)
    if not config.is_encoder_decoder:
        start = None
    for setting, ids in (("eos_token_id", ends), ("decoder_start_token_id", [0 if start is None else start])):
        if not all(type(token) is int for token in ids):
            raise MoewhError(f"{files.location}: {setting} in {name} is not a token id: {ids}. {_REMEDY}")
    return GenerationTokens(distinct_ends(ends), start)


def stated_ends(stated: Any, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return stated end tokens, one or several, as a list; if none is stated, the tokenizer's."""
    ends = tokenizer.eos_token_id if stated is None else stated
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def distinct_ends(ends: list[int]) -> tuple[int, ...]:
    """Return end tokens once each, in order. A negative id means none."""
    return tuple(dict.fromkeys(int(token) for token in ends if token >= 0))


def _read(files: Repository, name: str) -> dict[str, Any] | None:
    path = files.optional_file(name)
    if path is None:
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoewhError(f"{files.location}: {name} is not valid JSON: {error}. {_REMEDY}") from error
    if not isinstance(settings, dict):
        raise MoewhError(f"{files.location}: {name} is not a JSON object. {_REMEDY}")
    return settings
