"""The errors that users see: each is one line that says what is wrong and what to do.

The library raises them; only `moewh.cli.failures` turns them into a line on stderr and an exit code.
They name the options of the command; the doors of the Python API replace these with arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class MoewhError(Exception):
    """The work could not be done: bad input, an unusable model, a full disk. Exit code 1."""

    exit_code = 1


class UsageError(MoewhError):
    """The command was used incorrectly: an option or name does not exist or does not fit. Exit code 2."""

    exit_code = 2


NOT_POSIX = "moewh runs on Linux and macOS. On Windows, install it in WSL, the Windows Subsystem for Linux."
_LACKING = {
    ("can't start new thread", "Failed to launch worker thread"): (
        "no more threads can be started. Raise the limit (`ulimit -u`), or stop other processes of this user."
    ),
    ("Too many open files",): "too many files are open. Raise the limit (`ulimit -n`), and run the same command again.",
    ("std::bad_alloc", "bad allocation", "can't allocate memory", "Cannot allocate memory"): (
        "there is not enough memory. Stop other processes, or raise the limit (`ulimit -v`)."
    ),
}
"""Parts of the messages with which Python, Arrow, DuckDB and torch report that the system refuses more, and ours."""


_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
} | {ord(mark): f"\\{letter}" for mark, letter in zip("\a\b\t\n\v\f\r\x1b\0", "abtnvfre0", strict=True)}


def lacking(error: BaseException) -> str | None:
    """Return one line for an error that means a lack of memory, threads or open files; None for any other.

    Such an error says nothing about the input at which it occurs.
    """
    text = "bad allocation" if isinstance(error, MemoryError) else str(error)
    return next((line for parts, line in _LACKING.items() if any(part in text for part in parts)), None)


def short_message(error: BaseException) -> str:
    """Return a library's message on one line, cut to 300 characters, without a final period.

    Without a message, returns the name of the error's class.
    """
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message; without a message, the name of the error's class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()


def brief(value: object) -> str:
    """Return a value as a message shows it: on one line, and not much longer than one."""
    text = repr(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 80 else f"{text[:79]}…"


def escaped(text: str) -> str:
    """Return a text on one line that no terminal interprets: control characters as escapes such as `\\e`."""
    return text.translate(_ESCAPES)


def one_line(message: str) -> str:
    """Join a message's lines, with control characters escaped; spaces stay, since they may belong to a token."""
    return escaped(" ".join(line for line in map(str.strip, message.splitlines()) if line))


def with_arguments(text: str, arguments: Mapping[str, str]) -> str:
    """Return a message that names Python's arguments in place of the command's options, as `arguments` pairs them.

    `-p run=VALUE` becomes `run=VALUE`. What is within backquotes is a command and stays.
    """
    options = "|".join(map(re.escape, sorted(arguments, key=len, reverse=True))) or "(?!)"
    found = re.compile(rf"`[^`]*`|-p (?=\w+=)|(?<![\w-])(?P<option>{options})(?![\w-])")
    return found.sub(lambda match: match[0] if match[0][0] == "`" else arguments.get(match["option"], ""), text)


@contextmanager
def naming_arguments(arguments: Mapping[str, str]) -> Iterator[None]:
    """Have errors raised within be one line that names Python's arguments: see `with_arguments`."""
    try:
        yield
    except MoewhError as error:
        error.args = (one_line(with_arguments(str(error), arguments)),)
        raise


def require_utf8(path: str) -> str:
    """Return a path. Raises UsageError if its name is not UTF-8: DuckDB and safetensors cannot open it."""
    if path.encode(errors="replace").decode() != path:
        raise UsageError(f"the path {path!a} is not UTF-8. Rename it, or use a UTF-8 locale (LC_ALL=C.UTF-8).")
    return path
