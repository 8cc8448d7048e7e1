"""Make texts of tokens, prompts and domains safe to show: nothing in them affects a page, a terminal or a line.

In: any text from a model, a tokenizer or a user's file. Out: the same text, with a visible mark for each character that
is invisible or would move its surroundings.
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
"""Categories without a glyph: controls, marks of direction and width, unassigned, and line separators."""
_JOINERS = "\u200c\u200d"
"""Characters that join letters and emoji within a word in many scripts; they affect nothing beyond it."""


def visible(text: str) -> str:
    """Return a text with a mark for each character without a glyph: `⏎`, `␛`, `⟨U+202E⟩`. Spaces stay."""
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
    """Return a token as shown: its visible text, else `#` and its entry in the vocabulary, else `·`."""
    if text:
        return visible(text)
    return UNKNOWN if vocab_id is None else f"#{vocab_id}"


def script_json(data: Any) -> str:
    """Return data as JSON without `<`, `>` or `&`, for a page's `<script type="application/json">`."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
