"""Prompts for a run, and digests of the files that a run wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def write_prompts(path: Path, count: int) -> Path:
    rows = [{"text": f"prompt {n} " + "word " * (n % 9), "domain": ["a", "b", None][n % 3]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(warehouse: Path, *, with_run: bool = False) -> dict[str, str]:
    """Return the sha256 of every committed file by path.

    Left out are the run's own row, which holds the time, with its manifest, and the marks of sealed sets.
    """
    return {
        str(path.relative_to(warehouse)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("runs", "segments", "sealed")
        for path in sorted((warehouse / folder).rglob("*"))
        if path.is_file()
        and not path.name.startswith("mark-")
        and (with_run or folder != "runs" or path.name not in ("run.parquet", "manifest.json"))
    }
