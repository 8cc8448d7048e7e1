"""A run as plain data: what shapes its rows, and the rows that describe it.

Whoever observes routing (moewh's own forward passes, a user's, another program's trace) makes a `RunRecord` once and
hands it to the writer. Two runs of equal identity have equal rows, so the second resumes the first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from moewh.ingest.options import IngestOptions, option_of
from moewh.warehouse.files.names import run_id_characters

_OF_TOKENS = ("prompts_sha256", "tokenizer_sha256", "max_length", "on_overflow", "special_tokens")
_OF_TOKENS_IF_GIVEN = (*(one.name for one in fields(IngestOptions) if option_of(one).of_tokens), "template_time")
"""What else decides the tokens, in an identity only where it does."""


@dataclass(frozen=True)
class Identity:
    """Everything that shapes a run's rows, as JSON values."""

    shaping: dict[str, Any]
    run_id: str

    @property
    def sha256(self) -> str:
        """Digest of the identity."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def json(self) -> str:
        """The identity as canonical JSON, as stored in the column `options`."""
        return json.dumps(self.shaping, sort_keys=True)

    @property
    def tokens_key(self) -> str:
        """Digest of what determines the tokens and their ids: prompts, tokenizer and tokenisation options."""
        deciding: list[Any] = [self.shaping.get(name) for name in _OF_TOKENS]
        deciding += [[name, self.shaping[name]] for name in _OF_TOKENS_IF_GIVEN if name in self.shaping]
        if self.shaping.get("generate"):  # then the tokens depend on the model
            deciding.append(self.sha256)
        return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def default_run_id(model: str, shaping: dict[str, Any]) -> str:
    """Return the id of a run that was not given one: its model's base name, and a digest of what shapes its rows."""
    base = run_id_characters(model).lstrip("._-")[:54] or "model"
    return f"{base}-{Identity(shaping, '').sha256[:8]}"


@dataclass(frozen=True)
class RunRecord:
    """A run: its identity, its rows in the tables `runs`, `layers` and `experts`, by column, and its vocabulary.

    A column that a row leaves out is NULL. In `runs`, the writer fills in the columns that follow from the identity
    (identity, options, tokens_key), when the run began, and moewh's version.
    """

    identity: Identity
    run: dict[str, Any]
    layers: list[dict[str, Any]]
    experts: list[dict[str, Any]]
    vocabulary: pa.Array | None = None
    """[V] strings: each vocabulary entry's text by vocab_id, NULL where it has none; None without a vocabulary."""

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.identity.run_id
