"""The training text of the demo model: four domains, from files that every Python installation has.

In: the `.py` files of the running Python's standard library, `pydoc_data.topics`, and the
generators `mathematics` and `records`. Out: `Document`s, split into training and held-out ones
by whole document (module, topic or generator seed), never within one.

- `code`: standard-library source without comments, docstrings or multi-line strings.
- `prose`: English paragraphs of docstrings, comment blocks and the language reference's topics,
  without code, doctests, grammar or literal blocks.
- `math`, `json`: generated.

The text is the same for one version of Python and is not shipped; its digests are recorded.
"""

import ast
import hashlib
import inspect
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics

from moewh.ingest.demo.mathematics import math_document
from moewh.ingest.demo.records import json_document

DOMAINS: tuple[str, ...] = ("code", "prose", "math", "json")

# Tests repeat themselves, codecs are tables, and the rest is absent from many installations.
SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
    }
    | {"lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"}
)
GENERATED_DOCUMENTS = 1500
HELD_OUT_ONE_IN = 12


@dataclass(frozen=True)
class Document:
    """One indivisible piece of text: a module, a topic or one generator seed."""

    domain: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is held out from training; a module's code and prose are treated alike."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def documents() -> list[Document]:
    """Return all documents of all domains, in a fixed order."""
    modules = list(standard_library())
    code = [Document("code", name, code_only(source)) for name, source in modules]
    numbers = range(GENERATED_DOCUMENTS)
    generated = [Document("math", f"math-{n}", math_document(n)) for n in numbers]
    generated += [Document("json", f"json-{n}", json_document(n)) for n in numbers]
    return [document for document in code + prose(modules) + generated if document.text]


def split(found: list[Document]) -> tuple[list[Document], list[Document]]:
    """Return the training documents and the held-out ones."""
    return [d for d in found if not d.held_out], [d for d in found if d.held_out]


def digests(found: list[Document]) -> dict[str, str]:
    """Return the sha256 of each domain's text and of all text (`total`), in document order."""
    hashes = {name: hashlib.sha256() for name in (*DOMAINS, "total")}
    for document in found:
        for name in (document.domain, "total"):
            hashes[name].update(document.text.encode() + b"\0")
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (path in the standard library, source) of each module that can be read and parsed."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(inside.parts) or inside.parts[0].startswith("config-"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            ast.parse(source)
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        yield inside.as_posix(), source


# --- code ---------------------------------------------------------------------------------------

BLANK = frozenset({tokenize.NL, tokenize.COMMENT})
STATEMENT_START = frozenset({tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT})


def code_only(source: str) -> str:
    """Return the source without comments, string statements and multi-line strings ('' if it does not parse)."""
    lines = source.splitlines(keepends=True)
    # From the last cut to the first, so that earlier positions stay valid.
    for token, replacement in reversed(list(_cuts(source))):
        (row, column), (end_row, end_column) = token.start, token.end
        joined = lines[row - 1][:column] + replacement + lines[end_row - 1][end_column:]
        lines[row - 1 : end_row] = [joined] if joined.strip() else []
    text = "\n".join(line.rstrip() for line in lines)
    # No blank line where a docstring was, and never two.
    text = re.sub(r":\n\n+(?=[ \t])", ":\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    try:
        ast.parse(text)
    except SyntaxError:
        return ""
    return text + "\n" if text else ""


def _cuts(source: str) -> Iterator[tuple[tokenize.TokenInfo, str]]:
    """Yield the tokens to cut out of the source, in order, and their replacements.

    A string is its own statement if a statement may start before it and a line ends after it.
    """
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    visible = [token for token in tokens if token.type not in BLANK]
    first = visible[0]
    neighbours = {
        token.start: (before, after, later)
        for before, token, after, later in zip(visible, visible[1:], visible[2:], visible[3:], strict=False)
        if token.type == tokenize.STRING
    }
    for token in tokens:
        if token.type == tokenize.COMMENT or (token is first and token.type == tokenize.STRING):
            yield token, ""
        elif token.type == tokenize.STRING and token.start in neighbours:
            before, after, later = neighbours[token.start]
            if before.type in STATEMENT_START and after.type == tokenize.NEWLINE:
                alone = before.type == tokenize.INDENT and later.type == tokenize.DEDENT
                yield token, "pass" if alone else ""
            elif token.start[0] != token.end[0]:
                yield token, '""'


# --- prose --------------------------------------------------------------------------------------

MARKUP = re.compile(r":[a-z:]+:`([^`]*)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|``?([^`]+)``?")
PARAGRAPH = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'\"()?!-]{40,}[.?!]")
NOT_PROSE = re.compile(r"::|\(\)|\w\w\.\w|\w\(|--\w|\w--|\.\.\.|copyright|licen[cs]e|warrant|permission", re.IGNORECASE)
CAMEL = re.compile(r"[a-z][A-Z]")
WORD = re.compile(r"[(\"']*[A-Za-z]+(?:['-][a-z]+)*[)\"',.;:?!]*")


def prose(modules: list[tuple[str, str]]) -> list[Document]:
    """Return a document for each module or topic with English paragraphs, without repeated paragraphs."""
    sources = [(name, [*_docstrings(source), *_comment_blocks(source)]) for name, source in modules]
    sources += [(f"topic-{name}", [text]) for name, text in sorted(topics.items())]
    seen: set[str] = set()
    found = []
    for name, texts in sources:
        kept = [p for p in dict.fromkeys(p for text in texts for p in _paragraphs(text)) if p not in seen]
        seen.update(kept)
        found.append(Document("prose", name, "\n\n".join(kept) + "\n" if kept else ""))
    return found


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inspect.cleandoc(ast.get_docstring(node) or "")


def _comment_blocks(source: str) -> Iterator[str]:
    """Yield runs of full-line comments, without their `#`."""
    lines = [line.strip() for line in source.splitlines()]
    for commented, block in groupby(lines, key=lambda line: line.startswith("#")):
        if commented:
            yield "\n".join(line.lstrip("#").strip() for line in block)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of English prose in a text, each on one line, with inline markup removed."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        # Lists and tables are indented unevenly; a first line may be indented by itself.
        indents = {len(line) - len(line.lstrip()) for line in lines[1:] or lines}
        joined = MARKUP.sub(lambda m: next(g for g in m.groups() if g is not None), " ".join(block.split()))
        if len(indents) == 1 and _is_prose(joined):
            yield joined


def _is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is prose: few names, numbers or symbols, no code and no licence."""
    words = paragraph.split(" ")
    plain = sum(WORD.fullmatch(word) is not None for word in words)
    fits = PARAGRAPH.fullmatch(paragraph) and not NOT_PROSE.search(paragraph) and not CAMEL.search(paragraph)
    return bool(fits) and plain >= 0.88 * len(words)
