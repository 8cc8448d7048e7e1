"""Texts of tokens, prompts and domains as they are shown: nothing in them acts on a page, a terminal or a line.

In: any text that a model, a tokenizer or a user's file holds. Out: the same text with whatever cannot be seen, or
would move what stands beside it, as a visible mark.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

NEW_LINE = "⏎"
TAB = "⇥"
UNKNOWN = "·"
_MARKS = {"\n": NEW_LINE, "\r": "␍", "\t": TAB, "\x7f": "␡"}
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories without a glyph: controls, marks of direction and width, unassigned, and separators of lines."""
_JOINERS = "\u200c\u200d"
"""What joins letters and emoji within a word, in many scripts; it moves nothing beyond them."""


def visible(text: str) -> str:
    """Return a text with each character that has no glyph as a mark: `⏎`, `␛`, `⟨U+202E⟩`. Spaces stay."""
    if text.isprintable():
        return text
    return "".join(map(_mark, text))


def _mark(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    if character in _JOINERS or unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"⟨U+{ord(character):04X}⟩"


def token_text(text: str | None, vocab_id: int | None) -> str:
    """Return what stands for a token: its visible text, else `#` and its entry in the vocabulary, else `·`."""
    if text:
        return visible(text)
    return UNKNOWN if vocab_id is None else f"#{vocab_id}"


def script_json(data: Any) -> str:
    """Return data as JSON that can stand in a page's `<script type="application/json">`: it has no `<`, `>` or `&`."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
