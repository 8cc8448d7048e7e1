"""The report as one HTML page: contents in; a self-contained page, which needs no network, out.

The page is `page.html` with the style, the scripts, plotly.js (compressed) and the data inserted. The data cannot end
its script element: see `script_json`.
"""

from __future__ import annotations

import base64
import gzip
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from moewh.plots.texts import script_json
from moewh.warehouse.errors import UsageError

_HERE = Path(__file__).parent
_TOKENS = _HERE.parent / "plots"


def render(contents: dict[str, Any]) -> str:
    """Return the page of a report's contents. Raises UsageError if Plotly is not installed."""
    parts = {
        "style": _text(_HERE / "page.css") + _text(_TOKENS / "tokens.css"),
        "script": _text(_HERE / "page.js"),
        "tokens": _text(_TOKENS / "tokens.js"),
        "plotly": plotly_script(),
        "data": script_json(contents),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _text(_HERE / "page.html"))


@cache
def plotly_script() -> str:
    """Return plotly.js, compressed by gzip, as base64. Raises UsageError if Plotly is not installed."""
    try:
        script = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    except ModuleNotFoundError:
        raise UsageError("a report needs Plotly. Run `pip install 'moewh[report]'`.") from None
    return base64.b64encode(gzip.compress(script, 6, mtime=0)).decode()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
