"""`moewh import` as tests run it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from moewh.cli.main import main


def run_import(form: str, files: list[Path] | list[str], model: Path, root: Path) -> Result:
    words = ["import", form, *map(str, files), "--model", str(model), "--warehouse", str(root / "wh")]
    return CliRunner().invoke(main, words)


def require_refused(result: Result, said: str, root: Path, code: int = 1) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    assert len(result.output.splitlines()) == 1
    assert said in result.output
    assert not (root / "wh").exists()
