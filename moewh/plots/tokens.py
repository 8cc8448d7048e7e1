"""The token view: prompts with each token coloured by its expert at a layer.

`prompts_data` reads the routing of some prompts as plain data, which `tokens.js` draws in a page and `moewh show` in a
terminal. `tokens` returns a view that Jupyter and marimo display.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.ingest.recorder.arguments import whole
from moewh.plots.arguments import opened, whole_ids
from moewh.plots.texts import UNKNOWN, script_json, token_text, visible
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema

if TYPE_CHECKING:
    from moewh.api import Warehouse

_PROMPTS = """
-- Parameters:
--   run (run): the run.
--   prompt_ids (prompt ids): the prompts.
select prompt_id, domain, status
from prompts
where run_id = getvariable('run')::varchar
    and prompt_id in (select unnest(string_split(getvariable('prompt_ids')::varchar, ','))::bigint)
"""
_TOKENS = """
select tokens.prompt_id, tokens.token_id, tokens.position, tokens.kind, tokens.vocab_id, tokens.token
from tokens
where tokens.run_id = $run and tokens.prompt_id in ({ids})
order by tokens.token_id
"""
_ROUTES = """
select prompt_id, layer, token_id, list(expert order by rank, expert), list(weight order by rank, expert),
    count(rank) > 0 or count(*) = 1
from routing
where run_id = $run and prompt_id in ({ids})
group by prompt_id, layer, token_id
order by token_id, layer
"""
_LAYERS = "select layer, num_experts, top_k from layers where run_id = $run order by layer"
_RUN = "select model, tokens from runs where run_id = $run"
_NEWEST = "select run_id from runs where tokens > 0 order by created_at desc, run_id desc limit 1"

_PROMPT_ID_LIMIT = 1 << (63 - schema.POSITION_BITS)
"""Every prompt_id is less than this, because a token_id contains the prompt_id."""
TOKEN_COLUMNS = ("texts", "positions", "kinds")
"""A prompt's columns in `prompts_data` with one value per token, besides its routes."""
_ASSETS = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>Token view</title><style>{css}</style></head>
<body><main><h1 class="moewh-title">Experts of each token</h1><h2 class="moewh-title" id="run"></h2>
<p><label>Layer <select id="layer"></select></label></p><div id="tokens"></div></main>
<script type="application/json" id="data">{data}</script>
<script>{js}
const data = JSON.parse(document.getElementById("data").textContent);
document.getElementById("run").textContent = `Run ${{data.run}}`;
const select = document.getElementById("layer");
for (const {{layer}} of data.layers) select.add(new Option(layer, layer, layer === {layer}, layer === {layer}));
const draw = () => renderTokens(document.getElementById("tokens"), data, Number(select.value));
select.addEventListener("change", draw);
draw();
</script></body></html>
"""


def palette() -> list[str]:
    """Return the colours in `tokens.css` for the most used experts, as `#77aadd`; black is readable on each."""
    return re.findall(r"\.moewh-c\d \{ background: (#\w{6})", _asset("tokens.css"))


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


class TokenView:
    """Prompts with each token coloured by its expert; a notebook displays it as a cell's last value."""

    def __init__(self, data: dict[str, Any], layer: int) -> None:
        """Take the result of `prompts_data`, and the layer to show first."""
        self.data = data
        self.layer = layer

    def page(self) -> str:
        """Return a self-contained HTML page, which needs no other file and no network."""
        return _PAGE.format(
            css=_asset("tokens.css"),
            js=_asset("tokens.js"),
            data=script_json(self.data),
            layer=self.layer,
        )

    def _repr_html_(self) -> str:
        """Return the page in an iframe, which isolates its style and runs its scripts, in Jupyter and marimo."""
        tokens = sum(len(prompt["texts"]) for prompt in self.data["prompts"])
        height = min(700, 320 + tokens * 3)
        return (
            f'<iframe title="Experts of each token" sandbox="allow-scripts" srcdoc="{escape(self.page())}" '
            f'style="width: 100%; height: {height}px; border: 0"></iframe>'
        )

    def _mime_(self) -> tuple[str, str]:
        """Return the MIME type and content for marimo."""
        return ("text/html", self._repr_html_())

    def __repr__(self) -> str:
        prompts = ", ".join(str(prompt["prompt"]) for prompt in self.data["prompts"])
        return f"TokenView(run {self.data['run']!r}, prompt {prompts}, layer {self.layer})"


def tokens(
    wh: Warehouse, prompt_id: int | Iterable[int], layer: int | None = None, run: str | None = None
) -> TokenView:
    """Show the experts of each token of one or several prompts at a layer; other layers can be chosen in the view.

    `layer` defaults to the first MoE layer, `run` to the newest run with tokens. Raises MoewhError for a run, prompt or
    layer that does not exist, with those that do, and for a run without tokens.
    """
    ids = whole_ids(prompt_id)
    layer = None if layer is None else whole("layer", layer)
    data = prompts_data(opened(wh), newest_run(wh) if run is None else run, ids)
    return TokenView(data, known_layer(data, layer))


def newest_run(wh: Warehouse) -> str:
    """Return the newest run that has tokens. Raises MoewhError if none has."""
    rows = wh.sql(_NEWEST).fetchall()
    if not rows:
        raise MoewhError(f"no run in {wh.path} has tokens. Run `moewh ingest` first.")
    return str(rows[0][0])


def known_layer(data: dict[str, Any], layer: int | None) -> int:
    """Return a layer of the data's run, the first if None. Raises MoewhError for a layer that it does not have."""
    layers = [known["layer"] for known in data["layers"]]
    if layer is None:
        return int(layers[0])
    if layer not in layers:
        raise MoewhError(
            f"there is no MoE layer {layer} in run {data['run']}. MoE layers: {', '.join(map(str, layers))}."
        )
    return layer


def prompts_data(wh: Warehouse, run_id: str, prompt_ids: Sequence[int]) -> dict[str, Any]:
    """Return the tokens and the routing of some prompts of a run, in the requested order, as plain JSON data::

        {"run": "demo", "model": "olmoe", "notes": ["…"],
         "layers": [{"layer": 0, "experts": 16, "top_k": 4}, …],
         "prompts": [{"prompt": 3, "domain": "prose", "status": "ok",
                      "texts": ["The", " cat"], "positions": [0, 1], "kinds": ["prompt", "prompt"],
                      "routes": {"0": {"ranked": true, "experts": [[3, 7], null],
                                       "weights": [[0.61, 0.2], null]}, …}}, …]}

    `texts` are safe to show. A token's experts are in order of rank, strongest first, or by number where ranks are
    unknown (`ranked` is false). They are null for a token without rows at the layer. `weights`, to four digits, is null
    where weights are unknown. `notes` lists in words what the run does not record.
    Raises MoewhError for a run or prompt that does not exist, and for a run without tokens.
    """
    wanted = _distinct_ids(prompt_ids)
    ids = ", ".join(map(str, wanted))
    ((model, count),) = wh.sql(_RUN, run=run_id).fetchall()
    if not count:
        raise MoewhError(f"run {run_id} has no tokens to show: it holds only counts, or no segment yet.")
    found = wh.sql(_PROMPTS, run=run_id, prompt_ids=",".join(map(str, wanted))).fetchall()
    prompts = {
        prompt: {
            "prompt": prompt,
            "domain": None if domain is None else visible(domain),
            "status": status,
            **{name: [] for name in TOKEN_COLUMNS},
            "routes": {},
        }
        for prompt, domain, status in found
    }
    token_rows = wh.sql(_TOKENS.format(ids=ids), run=run_id).fetchall()
    offsets = _add_tokens(prompts, token_rows)
    layers = wh.sql(_LAYERS, run=run_id).fetchall()
    _add_routes(
        prompts, offsets, [layer for layer, *_ in layers], wh.sql(_ROUTES.format(ids=ids), run=run_id).fetchall()
    )
    data: dict[str, Any] = {
        "run": run_id,
        "model": None if model is None else visible(model),
        "layers": [{"layer": layer, "experts": experts, "top_k": top_k} for layer, experts, top_k in layers],
        "prompts": [prompts[prompt_id] for prompt_id in wanted],
    }
    return {**data, "notes": _notes(data["prompts"], texts=all(row[-1] is not None for row in token_rows))}


def _distinct_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Return each prompt_id once, in order. Raises UsageError without any, and for one that no prompt can have."""
    wanted = list(dict.fromkeys(int(prompt_id) for prompt_id in prompt_ids))
    if not wanted:
        raise UsageError("no prompt is named. Give at least one prompt_id.")
    for prompt_id in wanted:
        if not 0 <= prompt_id < _PROMPT_ID_LIMIT:
            raise UsageError(
                f"there is no prompt {prompt_id}: a prompt_id is a whole number from 0 to {_PROMPT_ID_LIMIT - 1:,}."
            )
    return wanted


def _add_tokens(prompts: dict[int, dict[str, Any]], rows: list[tuple[Any, ...]]) -> dict[int, int]:
    """Add each token to its prompt; return its offset there by token_id."""
    offsets = {}
    for prompt_id, token_id, position, kind, vocab_id, text in rows:
        prompt = prompts[prompt_id]
        offsets[token_id] = len(prompt["texts"])
        prompt["texts"].append(token_text(text, vocab_id))
        prompt["positions"].append(position)
        prompt["kinds"].append(kind)
    return offsets


def _add_routes(
    prompts: dict[int, dict[str, Any]], offsets: dict[int, int], layers: list[int], rows: list[tuple[Any, ...]]
) -> None:
    """Add to each prompt the experts and weights of its tokens, by layer."""
    for prompt in prompts.values():
        nothing = [None] * len(prompt["texts"])
        prompt["routes"] = {
            str(layer): {"ranked": True, "experts": list(nothing), "weights": list(nothing)} for layer in layers
        }
    for prompt_id, layer, token_id, experts, weights, ranked in rows:
        route = prompts[prompt_id]["routes"][str(layer)]
        route["experts"][offsets[token_id]] = experts
        route["weights"][offsets[token_id]] = _rounded(weights)
        route["ranked"] = route["ranked"] and ranked
    for prompt in prompts.values():
        for route in prompt["routes"].values():
            if not any(route["weights"]):
                route["weights"] = None


def _rounded(weights: Iterable[float | None]) -> list[float] | None:
    """Return weights rounded to four digits; None unless all are known."""
    rounded = [float(f"{weight:.4g}") for weight in weights if weight is not None and math.isfinite(weight)]
    return rounded if rounded and len(rounded) == len(list(weights)) else None


def _notes(prompts: list[dict[str, Any]], *, texts: bool) -> list[str]:
    """Return notes on what is unknown about these prompts' tokens."""
    routes = [route for prompt in prompts for route in prompt["routes"].values() if any(route["experts"])]
    notes = []
    if not texts:
        notes.append(f"Some tokens have no text: #N is entry N of the vocabulary, {UNKNOWN} a token without an entry.")
    if not all(route["ranked"] for route in routes):
        notes.append("Which of its experts a token chose first is unknown: they are listed by number.")
    if any(route["weights"] is None for route in routes):
        notes.append("Weights are unknown.")
    if not routes:
        notes.append("No token here went to an expert.")
    return notes
