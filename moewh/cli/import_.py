"""`moewh import`: pass a trace that another program recorded to `moewh.ingest.traces.run`; print a closing line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from moewh.cli.options import warehouse_option
from moewh.ingest.options import SEGMENT_ROWS
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import check_run_id

if TYPE_CHECKING:
    from moewh.ingest.traces.run import Imported


class _FormatChoice(click.ParamType[str]):
    """The name of a format: a module of `ingest/traces/formats/`, listed on first use."""

    name = "format"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name if there is such a format, else fail with a list of the formats."""
        from moewh.ingest.traces.trace import format_names

        if value not in format_names():
            self.fail(f"{value!r} is not a trace format. Known: {', '.join(format_names())}.", param, ctx)
        return value

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click gives it
        param: click.Parameter,  # noqa: ARG002 - and this
        incomplete: str,
    ) -> list[CompletionItem[str]]:
        """Complete the name of a format."""
        from moewh.ingest.traces.trace import format_names

        return [CompletionItem(name) for name in format_names() if name.startswith(incomplete)]


@click.command("import", short_help="Turn routing that another program recorded into a run.")
@click.argument("format", type=_FormatChoice(), metavar="FORMAT")
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@click.option("--model", required=True, metavar="ID_OR_CONFIG", help="Hub id, folder or config.json of the model.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a Hub id.")
@click.option("--tokenizer", metavar="ID_OR_PATH", help="Tokenizer that gives token ids their text.")
@click.option("--run-id", metavar="ID", help="Run id.  [default: the model's name and a digest]")
@click.option("--domain", metavar="NAME", help="Domain of every prompt, instead of the trace's own.")
@click.option(
    "--segment-rows",
    type=click.IntRange(min=1),
    default=SEGMENT_ROWS,
    show_default=True,
    help="Routing rows per segment; memory grows with it.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
@warehouse_option
def import_(*, warehouse: Layout, run_id: str | None, **chosen: Any) -> None:
    """Turn routing that another program recorded into a run of the warehouse.

    FORMAT names the program; docs/import.md describes each format. Experts, experts per token and MoE layers come from
    the model's configuration. What a trace does not hold stays NULL: ranks, weights, token ids, text. A file with any
    fault is refused, and nothing is written. Killed and run again, the same command completes the run.
    """
    from moewh.cli.ingest import RESUME_ADVICE
    from moewh.ingest.traces.run import ImportOptions, import_trace
    from moewh.warehouse.stopping import stoppable

    options = ImportOptions(run_id=run_id and check_run_id(run_id), **chosen)
    with stoppable(lambda: RESUME_ADVICE) as check:
        imported = import_trace(options, warehouse, lambda *_: check())
    click.echo(summary_line(imported), err=True)


def summary_line(imported: Imported) -> str:
    """Return one line that reports what the command did."""
    if not imported.written:
        return f"run {imported.run_id} is complete already; nothing was written."
    if imported.load:
        return f"run {imported.run_id}: {imported.load:,} choices counted; it has load and nothing else."
    prompts, tokens, rows = (
        sum(getattr(part, name) for part in imported.written) for name in ("prompts", "tokens", "routing_rows")
    )
    line = f"run {imported.run_id}: {prompts:,} prompt{'s'[: prompts != 1]}, {tokens:,} tokens, {rows:,} routing rows"
    if imported.missing:
        line += f"; {imported.missing / (imported.missing + imported.routes):.1%} of the trace was not captured"
    return line
