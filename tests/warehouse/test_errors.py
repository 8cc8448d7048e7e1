"""The messages of libraries, as parts of moewh's own."""

from __future__ import annotations

import pytest

from moewh.warehouse.errors import first_line, short_message


@pytest.mark.parametrize(
    ("error", "first", "short"),
    [
        (ValueError("no room.\n  Try again. "), "no room.", "no room. Try again"),
        (KeyError(), "KeyError", "KeyError"),
        (RuntimeError(" \n "), "RuntimeError", "RuntimeError"),
        (OSError("x" * 400), "x" * 400, "x" * 300),
    ],
)
def test_a_message_or_the_name_of_its_error(error: Exception, first: str, short: str) -> None:
    assert (first_line(error), short_message(error)) == (first, short)
