"""Placements: which GPU holds which expert, converted from a file to the text that `placement_quality` reads.

A file is Parquet or JSON (a list of objects, or one per line) with integer columns layer, expert and gpu; an expert
with copies on several GPUs has several rows. The text is `layer:expert:gpu`, separated by commas.
"""

from __future__ import annotations

import re
from pathlib import Path

from moewh.warehouse.errors import UsageError, first_line, require_utf8

_TEXT = re.compile(r"[0-9]{1,6}:[0-9]{1,7}:[0-9]{1,7}(,[0-9]{1,6}:[0-9]{1,7}:[0-9]{1,7})*")
_COLUMNS = ("layer", "expert", "gpu")


def placement_text(value: str) -> str:
    """Return a placement as text, from that text or from the path of a file.

    Raises UsageError for any other value, and for a file that lacks a column or has NULLs or values that are not whole
    numbers.
    """
    if _TEXT.fullmatch(value):
        return value
    path = Path(value)
    known = path.suffix in (".parquet", ".json", ".jsonl")
    if known and not path.is_file():
        raise UsageError(f"-p placement={value}: there is no file {value}.")
    if not known:
        raise UsageError(
            f"-p placement={value}: placement is a .parquet, .json or .jsonl file with {', '.join(_COLUMNS)}, "
            "or a text such as 0:0:0,0:1:3 (layer:expert:gpu)."
        )
    import duckdb

    reader = "read_parquet" if path.suffix == ".parquet" else "read_json"
    with duckdb.connect() as connection:
        try:
            relation = connection.execute(f"select {', '.join(_COLUMNS)} from {reader}(?)", [require_utf8(value)])
            rows = relation.fetchall()
        except duckdb.Error as error:
            raise UsageError(f"{path} cannot be read as a placement: {first_line(error)}") from None
    for number, row in enumerate(rows):
        if not all(type(item) is int and 0 <= item < 1 << 20 for item in row):
            shown = ", ".join(f"{name} = {item}" for name, item in zip(_COLUMNS, row, strict=True))
            raise UsageError(f"{path}, row {number}: {shown}. Give whole numbers from 0.")
    if not rows:
        raise UsageError(f"{path} has no rows.")
    return ",".join(f"{layer}:{expert}:{gpu}" for layer, expert, gpu in sorted(set(rows)))
