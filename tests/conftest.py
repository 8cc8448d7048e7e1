"""What holds for every test: no network, and one thread: threads that wait for each other make tiny models slow.

Side by side (`make test`), the tests of a file run in one process, so that what it builds once is built once. So do
the files that look at the same models of all families, which `observed_families` ingests once per process.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
pytest.register_assert_rewrite("tests.support")  # their failures show values, as the tests' own do
TOGETHER = {"test_families.py": "families", "test_families_page.py": "families", "test_inspect.py": "families"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for `--dist loadgroup` by file."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(item.path.name, str(item.path))))
