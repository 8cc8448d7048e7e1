"""docs/families.md agrees with the tests' results."""

from __future__ import annotations

import pytest
import transformers

from tools.families_page import PAGE, families_page, pinned_transformers


def test_page_says_what_was_found() -> None:
    if transformers.__version__ != pinned_transformers():
        pytest.skip(f"the page is about transformers {pinned_transformers()}, not {transformers.__version__}")
    assert PAGE.read_text() == families_page(), "docs/families.md is stale. Run `make docs`."
