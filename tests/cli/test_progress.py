"""What a terminal shows while `moewh ingest` works."""

from __future__ import annotations

import pytest

from moewh.cli.progress import Reporter
from moewh.ingest.record import Identity


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


def last_line(shown: str) -> str:
    """What stays on the last line: what follows the last command that erases it."""
    return shown.replace("\x1b[?25h", "").rpartition("\x1b[2K")[2]


def test_the_bar_is_there_before_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Importing torch and reading weights take seconds, in which the terminal says what it waits for."""
    with Reporter() as reporter:
        assert "loading the model" in last_line(capsys.readouterr().err)
        reporter.started(Identity({}, "mine"), 3)
        reporter.batch_done(1_500)
        reporter.segment_done(0, 3)
    shown = last_line(capsys.readouterr().err)
    assert "mine" in shown
    assert "1/3" in shown
    assert "1,500 tokens" in shown
    assert "loading" not in shown


def test_a_run_that_did_not_start_leaves_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter():
        pass
    assert "loading" not in last_line(capsys.readouterr().err)
