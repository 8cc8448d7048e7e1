"""Documents cannot drift: README commands give the output shown, and the generated pages are current."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from moewh.ingest.options import PROMPT_FORMATS
from moewh.report.contents import panels
from moewh.warehouse.answer.catalog import describe_views
from moewh.warehouse.answer.export import export_names
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.views.shipped import canned_names
from tests.support.escapes import ESCAPES
from tests.support.forked_program import forked_moewh
from tools.documents import (
    README,
    SCHEMA_PAGE,
    VIEWS_PAGE,
    console_blocks,
    loss_table,
    run_command,
    schema_page,
    views_page,
)

_NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?")
_MACHINE = re.compile(r"[\d,.]+(?= tokens/s|% of the time| GiB at most)")
"""Numbers that depend on the machine."""


def same(shown: str, real: str) -> bool:
    """Return whether two outputs agree: words exactly, numbers to 2%, ignoring speeds and box widths.

    Processors differ in the last bits of a matrix product, which may change the expert in a near-tie.
    """

    def words(text: str) -> list[str]:
        return _NUMBER.sub("#", _MACHINE.sub("N", re.sub(r"[─│┌┐└┘├┤┬┴┼]+", " ", text))).split()

    def numbers(text: str) -> list[float]:
        return [float(found.replace(",", "")) for found in _NUMBER.findall(_MACHINE.sub("N", text))]

    pairs = zip(numbers(shown), numbers(real), strict=False)
    return words(shown) == words(real) and all(math.isclose(a, b, rel_tol=0.02, abs_tol=0.011) for a, b in pairs)


@pytest.mark.parametrize(
    ("shown", "real", "alike"),
    [
        ("a 100 tokens", "a 101 tokens", True),
        ("a 100 tokens", "a 104 tokens", False),
        ("a 100 tokens", "b 100 tokens", False),
        ("1 2", "1", False),
        ("5 tokens, 10 tokens/s", "5 tokens, 9,000 tokens/s", True),
        ("expert 3", "expert 4", False),
    ],
)
def test_same_sees_what_differs(shown: str, real: str, alike: bool) -> None:
    assert same(shown, real) is alike


def test_readme_commands_give_the_output_shown(tmp_path: Path) -> None:
    """The first starts as a user's does; the others' processes are forked."""
    commands = [pair for block in console_blocks(README.read_text()) for pair in block]
    assert commands[0][0] == "moewh demo"
    (tmp_path / "empty").mkdir()
    with forked_moewh(tmp_path / "forked", models=True) as program:
        for number, (command, shown) in enumerate(commands):
            real = run_command(command, tmp_path / "empty", program.parent if number else None)
            assert same(shown, real), f"$ {command}\n{real}\nREADME shows:\n{shown}\nRun `make docs`."


def test_readme_shows_what_the_demo_learned() -> None:
    assert loss_table() in README.read_text()


def test_schema_page_is_current() -> None:
    assert SCHEMA_PAGE.read_text() == schema_page(), "run `make docs`"


def test_views_page_is_current() -> None:
    assert VIEWS_PAGE.read_text() == views_page(), "run `make docs`"


def test_metrics_page_has_every_view_that_has_a_formula() -> None:
    page = (README.parent / "docs" / "metrics.md").read_text()
    formulas = [name for name in canned_names() if " = " in describe_views()[name].header]
    assert len(formulas) > 10
    assert [name for name in formulas if f"`{name}`" not in page] == []


def test_pages_list_what_a_folder_holds() -> None:
    """Figures, exports, prompt formats and output formats, each found by listing a folder or a table of one file."""
    report, python, export = (
        (README.parent / "docs" / f"{name}.md").read_text() for name in ("report", "python", "export")
    )
    for name, panel in panels():
        assert f"\n| {panel.title} | " in report, name
        assert f"`{name}(wh" in python, name
    assert [name for name in export_names() if f"| `{name}` |" not in export] == []
    (files,) = re.findall(r"^\| files \| (.*) \|$", README.read_text(), re.MULTILINE)
    assert [name for name in PROMPT_FORMATS if f"`.{name}`" not in files] == []
    assert f"`--format {'|'.join(FORMATS)}`" in README.read_text()


def test_security_page_counts_the_ways_out() -> None:
    page = (README.parent / "SECURITY.md").read_text()
    assert [int(count) for count in re.findall(r"(\d+) ways out", page)] == [len(ESCAPES)]
