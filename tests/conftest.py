"""What holds for every test: no network, and one thread: threads that wait for each other make tiny models slow.

With `-n 2 --dist loadfile`, as in `make test`, a file's tests run in one process, which builds once what they share.
So do the tests of the files that need every family's model: `observed_families` ingests each once per process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moewh.warehouse.sealing import seal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
seal.PAUSE = 0.0  # hundreds of tests ingest; those of sealing itself set it again
pytest.register_assert_rewrite("tests.support")  # its assertions show values when they fail, as a test's do
OF_EVERY_FAMILY = {"test_families.py", "test_families_page.py", "test_inspect.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole files, and those of every family together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope
    together = lambda test: "every family" if Path(file_of(test)).name in OF_EVERY_FAMILY else file_of(test)  # noqa: E731
    scheduler._split_scope = together
    return scheduler
