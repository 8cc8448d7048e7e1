"""Reports of checks: lines of text, JSON, or JUnit XML for continuous integration.

In: one `Result` per check, as each is completed. Out: the report and its exit code. In XML, characters that XML 1.0
does not allow are written as Python escapes, such as `\\x00`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO
from xml.etree import ElementTree

from moewh.warehouse.errors import UsageError, escaped

FORMATS = ("text", "json", "junit")
_SUFFIXES = {".json": "json", ".xml": "junit", ".txt": "text", ".log": "text", "": "text"}
SHOWN = 20
"""Faults per check that text and JUnit show; all are counted."""
KEPT = 1_000
"""Faults per check that JSON holds; all are counted."""
_NOT_IN_XML = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class FaultRow:
    """One row of a check, as a line of text and by column."""

    text: str
    row: dict[str, Any]


@dataclass
class Result:
    """The result of one check: its first KEPT faults, their total number, and the time it took."""

    name: str
    status: Literal["ok", "faults", "error"] = "ok"
    faults: int = 0
    kept: list[FaultRow] = field(default_factory=list)
    seconds: float = 0.0
    message: str = ""
    """Why the check could not run."""

    @property
    def summary(self) -> str:
        """The result in a few words."""
        if self.status == "error":
            return self.message
        return f"{self.faults:,} fault{'' if self.faults == 1 else 's'}" if self.faults else "ok"

    @property
    def lines(self) -> list[str]:
        """The faults to show, and the number of those left out."""
        more = [f"and {self.faults - SHOWN:,} more"] if self.faults > SHOWN else []
        return [fault.text for fault in self.kept[:SHOWN]] + more


def choose_format(name: str | None, output: Path | None) -> str:
    """Return the requested format, else that of the file's suffix; without one, `text`. Raises UsageError."""
    chosen = name or _SUFFIXES.get("" if output is None else output.suffix.lower())
    if chosen is None:
        raise UsageError(f"cannot tell the format of {output} from its name. Add --format {'|'.join(FORMATS)}.")
    return chosen


def report(results: Iterable[Result], form: str, stream: TextIO) -> int:
    """Write the results in one of FORMATS; return 0, 1 if there are faults, or 2 if a check could not run."""
    worst = 0

    def watched() -> Iterator[Result]:
        nonlocal worst
        for result in results:
            worst = max(worst, {"ok": 0, "faults": 1, "error": 2}[result.status])
            yield result

    {"text": _write_text, "json": _write_json, "junit": _write_junit}[form](watched(), stream)
    return worst


def emit(text: str, stream: TextIO) -> None:
    """Write and flush a part of a report. Once its reader has stopped (`| head`), nothing is written.

    The exit code is still that of all checks: a fault must not pass because nobody read it.
    """
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _write_text(results: Iterable[Result], stream: TextIO) -> None:
    """Write each check's faults and summary as soon as it is done; checks that could not run appear on stderr only."""
    for result in results:
        if result.status != "error":
            lines = [*result.lines, result.summary]
            emit("".join(f"{escaped(f'{result.name}: {line}')}\n" for line in lines), stream)


def _write_json(results: Iterable[Result], stream: TextIO) -> None:
    written = [
        {"check": result.name, "status": result.status, "faults": result.faults, "seconds": round(result.seconds, 3)}
        | ({"message": result.message} if result.message else {})
        | {"rows": [_plain(fault.row) for fault in result.kept]}
        for result in results
    ]
    emit(json.dumps(written, ensure_ascii=False, indent=1) + "\n", stream)


def _plain(value: Any) -> Any:
    """Return a value as a JSON type; values that JSON lacks become text, including NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _write_junit(results: Iterable[Result], stream: TextIO) -> None:
    """Write one test suite with a test case per check: a failure if it has faults, an error if it could not run."""
    done = list(results)
    suite = {
        "name": "moewh check",
        "tests": str(len(done)),
        "failures": str(sum(result.status == "faults" for result in done)),
        "errors": str(sum(result.status == "error" for result in done)),
        "skipped": "0",
        "time": f"{sum(result.seconds for result in done):.3f}",
    }
    root = ElementTree.Element("testsuites", suite)
    cases = ElementTree.SubElement(root, "testsuite", suite)
    for result in done:
        about = {"classname": "moewh.check", "name": _xml(result.name), "time": f"{result.seconds:.3f}"}
        case = ElementTree.SubElement(cases, "testcase", about)
        if result.status != "ok":
            outcome = "failure" if result.status == "faults" else "error"
            ElementTree.SubElement(case, outcome, message=_xml(result.summary)).text = _xml("\n".join(result.lines))
    ElementTree.indent(root)
    emit(f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n', stream)


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
