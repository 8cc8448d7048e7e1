"""The contents of a report: runs, figures, top tokens and prompts as plain data, from a warehouse.

In: a warehouse, and a choice of runs and domains. Out: one object for the page's JSON, which `page.js` shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moewh.plots.figures.top_tokens import MIN_TOKENS
from moewh.plots.figures.top_tokens import PANEL as TOP_TOKENS
from moewh.plots.panel import DOMAIN, REFERENCE, RUN, Panel
from moewh.plots.rows import Rows
from moewh.plots.texts import visible
from moewh.plots.tokens import TOKEN_COLUMNS, prompts_data
from moewh.report.drawings import drawing, selectors, token_table
from moewh.warehouse import __version__
from moewh.warehouse.answer.existence import require_existing
from moewh.warehouse.answer.query import saved_names
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.views.shipped import view_names

if TYPE_CHECKING:
    import duckdb

    from moewh.api import Warehouse

FIGURES = (
    *("load", "balance", "balance_over_training", "domains", "specialization", "top_tokens", "co_routing"),
    *("transitions", "repetition", "information", "saturation", "saliency", "geometry"),
)
"""The figures in page order. A figure that is not listed goes to the end."""
FEW_PROMPTS = 8
FIRST_TOKENS = 128
"""Most tokens per prompt in the token view, unless a number of prompts is given."""
PROMPT_ROWS = 150_000
"""Routing rows in the token view, over all runs, unless a number of prompts is given."""
TOKENS_PER_COUNT = 100_000
"""In larger runs, a top token must occur once per this many tokens, where that is more than MIN_TOKENS."""
MOST_ROWS = 3_000_000
"""Figures that read rows are drawn up to this many routing rows, over all runs."""
TOKEN_VIEW = {
    "name": "tokens",
    "title": "Token view",
    "about": "Prompts with each token coloured by the expert it chose first at the layer. Point at a token, or move to "
    "it with Tab and the arrow keys, for its weights and runners-up.",
    "by": ["run", "layer"],
    "measures": [""],
    "drawings": [],
    "empty": "No prompts: the run holds only counts, its prompts are too long for a page, or none were requested. "
    "`--prompts N` includes N prompts, whatever their length.",
}
_RUNS = """
select
    run_id, model, revision, series, train_step, status, origin, origin_format, dtype, prompts, tokens,
    strftime(created_at, '%Y-%m-%d') as created
from runs
order by created_at, run_id"""
_LAYERS = "select run_id, layer, num_experts, top_k from layers order by run_id, layer"
_DOMAINS = (
    "select distinct run_id, domain from expert_counts where kind <> 'special' order by run_id, domain nulls last"
)
_PROMPTS = """
select prompt_id, num_tokens
from (
    select prompt_id, num_tokens, domain, row_number() over (partition by domain order by prompt_id) as turn
    from prompts
    where run_id = $run and num_tokens > 0 and ($domain is null or domain = $domain)
)
order by turn, domain nulls last, prompt_id
limit $most"""
"""One prompt of each domain in turn."""


@dataclass(frozen=True)
class ReportOptions:
    """What a report should hold."""

    runs: Sequence[str] = ()
    """The runs; empty: all of them."""
    domain: str | None = None
    """The only domain; None: all."""
    prompts: int | None = None
    """Prompts in the token view; None: a few, to keep the page small."""


def collect(warehouse: Warehouse, options: ReportOptions) -> dict[str, Any]:
    """Return a report's contents. Raises MoewhError without any run, and for a run or domain that does not exist."""
    return _Contents(warehouse, options).collect()


@dataclass
class _Contents:
    """Collects a report's contents."""

    warehouse: Warehouse
    options: ReportOptions
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The warehouse's connection."""
        return self.warehouse.connection

    def collect(self) -> dict[str, Any]:
        self.connection.execute("set enable_progress_bar = false")  # DuckDB's own bar would be printed here
        self._find_runs()
        domains = {domain for run in self.runs for domain in run["domains"] if domain is not None}
        return {
            "version": __version__,
            "runs": self.runs,
            "domain_texts": [[domain, visible(domain)] for domain in sorted(domains)],
            "panels": [*(self._panel(name, panel) for name, panel in panels()), TOKEN_VIEW],
            "prompts": self._prompts(),
        }

    def _find_runs(self) -> None:
        look = self.connection.execute
        named_runs: Sequence[str | None] = self.options.runs or [None]
        for run_id in named_runs:
            named = {"run": run_id, "domain": self.options.domain}
            given = {name: value for name, value in named.items() if value is not None}
            require_existing(lambda sql, values: look(sql, dict(values)).fetchall(), {k: k for k in given}, given)
        cursor = look(_RUNS)
        names = [column[0] for column in cursor.description or ()]
        rows = [{name: _shown(value) for name, value in zip(names, row, strict=True)} for row in cursor.fetchall()]
        self.runs = [row for row in rows if not self.options.runs or row[RUN] in self.options.runs]
        if not self.runs:
            raise MoewhError(f"there are no runs in {self.warehouse.path}. `moewh ingest` makes one.")
        layers, domains = look(_LAYERS).fetchall(), look(_DOMAINS).fetchall()
        for run in self.runs:
            run["layers"] = [{"layer": n, "experts": e, "top_k": k} for run_id, n, e, k in layers if run_id == run[RUN]]
            found = [domain for run_id, domain in domains if run_id == run[RUN]]
            run["domains"] = [name for name in found if self.options.domain in (None, name)]

    def _rows(self) -> int:
        """Return the number of routing rows of the runs."""
        return sum((run["tokens"] or 0) * sum(layer["top_k"] or 0 for layer in run["layers"]) for run in self.runs)

    def _sampled_prompts(self) -> int:
        """Return how many prompts have about MOST_ROWS routing rows, over all runs."""
        prompts = min(run["prompts"] for run in self.runs if run["tokens"])
        return int(max(1, prompts * MOST_ROWS // self._rows()))

    def _panel(self, name: str, panel: Panel) -> dict[str, Any]:
        large = panel.scans and self._rows() > MOST_ROWS
        if large and panel.sample:
            panel = replace(panel, query=panel.sample, values={"prompts": self._sampled_prompts()})
        if panel is TOP_TOKENS:
            most = max(run["tokens"] or 0 for run in self.runs)
            panel = replace(panel, values={"min_tokens": max(MIN_TOKENS, most // TOKENS_PER_COUNT)})
        contents: dict[str, Any] = {"name": name, "title": panel.title, "about": panel.about, "empty": panel.empty}
        contents |= {"by": selectors(panel), "measures": list(panel.measures)}
        if large and not panel.sample:
            left_out = f"Left out: it reads every routing row, {self._rows():,} here. Use `moewh query {panel.query}`."
            return contents | {"drawings": [], "empty": left_out}
        if large:
            contents["about"] += (
                f" Over the first {panel.values['prompts']:,} prompts of each run, because there are too many for all."
            )
        found = list(self._drawings(panel))
        if name == "top_tokens":
            return contents | {"table": token_table(found), "values": panel.values, "drawings": []}
        shapes: dict[str, Any] = {}
        return contents | {"drawings": [drawing(panel, at, rows, shapes) for at, rows in found], "shapes": shapes}

    def _prompts(self) -> dict[str, Any]:
        """Return some prompts of each run with tokens, in the form of `prompts_data`."""
        room = PROMPT_ROWS // len(self.runs)
        most = FEW_PROMPTS if self.options.prompts is None else self.options.prompts
        by_run = {}
        for run in self.runs:
            values = {"run": run[RUN], "domain": self.options.domain, "most": min(most, run["prompts"] or 0)}
            found = self.connection.execute(_PROMPTS, values).fetchall()
            if self.options.prompts is None:
                found = _within(found, room // max(1, sum(layer["top_k"] or 0 for layer in run["layers"])))
            if found and run["tokens"]:
                shown = prompts_data(self.warehouse, run[RUN], [prompt_id for prompt_id, _ in found])
                by_run[run[RUN]] = _cut(shown) if self.options.prompts is None else shown
        return by_run

    def _drawings(self, panel: Panel) -> Iterator[tuple[dict[str, Any], Rows]]:
        """Yield the selections that the report shows, those of a series with only the report's runs."""
        ids = {run[RUN] for run in self.runs}
        for at, found in panel.drawings(self.connection, {}):
            rows = found
            if REFERENCE in at:
                kept = [run_id in ids for run_id in found[RUN].tolist()]
                rows = {name: column[kept] for name, column in found.items()}
            if not len(rows[RUN]) or (REFERENCE not in at and at[RUN] not in ids):
                continue
            if DOMAIN in at and self.options.domain not in (None, at[DOMAIN]):
                continue
            yield at, rows


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def panels() -> list[tuple[str, Panel]]:
    """Return every figure that this warehouse's queries can provide, in page order."""
    from moewh.plots import FIGURES as FILES

    order = {name: index for index, name in enumerate(FIGURES)}
    named = sorted(FILES, key=lambda name: order.get(name, len(order)))
    found = ((name, import_module(f"moewh.plots.figures.{name}").PANEL) for name in named)
    known = {*view_names(), *saved_names()}
    return [(name, panel) for name, panel in found if panel.query in known]


def _within(prompts: Sequence[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """Return the first prompts, (prompt_id, num_tokens), that together show at most `tokens` tokens."""
    kept = []
    for prompt_id, length in prompts:
        if (shown := min(length, FIRST_TOKENS)) <= tokens:
            kept.append((prompt_id, length))
            tokens -= shown
    return kept


def _cut(data: dict[str, Any]) -> dict[str, Any]:
    """Return prompts with only their first tokens, and a note about the rest."""
    if all(len(prompt["texts"]) <= FIRST_TOKENS for prompt in data["prompts"]):
        return data
    prompts = []
    for prompt in data["prompts"]:
        cut = {name: prompt[name][:FIRST_TOKENS] for name in TOKEN_COLUMNS}
        routes = {
            layer: {name: part[:FIRST_TOKENS] if isinstance(part, list) else part for name, part in route.items()}
            for layer, route in prompt["routes"].items()
        }
        prompts.append({**prompt, **cut, "routes": routes})
    note = f"Long prompts show only {FIRST_TOKENS} tokens; `moewh report --prompts N` shows all tokens of N prompts."
    return {**data, "prompts": prompts, "notes": [*data["notes"], note]}
