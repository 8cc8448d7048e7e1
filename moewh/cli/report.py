"""`moewh report`: write one HTML page with every figure."""

from __future__ import annotations

from pathlib import Path

import click

from moewh.cli.options import readable_option
from moewh.warehouse.remote.published import Readable


@click.command(short_help="Write one HTML page with every figure.")
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="Where to write; an existing file is replaced.",
)
@click.option("--run", "runs", multiple=True, metavar="ID", help="Only this run. Repeatable.  [default: every run]")
@click.option("--domain", metavar="NAME", help="Only this domain.")
@click.option(
    "--prompts",
    type=click.IntRange(min=0),
    metavar="N",
    help="Prompts per run in the token view.  [default: up to 8, as the page's size allows]",
)
@readable_option
def report(
    *, output: Path, runs: tuple[str, ...], domain: str | None, prompts: int | None, warehouse: Readable
) -> None:
    """Write one HTML page with every figure of the warehouse's runs, for a browser, without a network.

    The page shows load, balance, domains, top tokens, co-routing, transitions, repetition, information, and whatever
    else the runs have, with the query behind each, and prompts with the experts of each token. You choose run, domain
    and layer in the page. It holds the text of those prompts: `--prompts 0` leaves them out.
    """
    from moewh.api import Warehouse
    from moewh.report.contents import ReportOptions, collect
    from moewh.report.page import plotly_script, render
    from moewh.warehouse.answer.output import replaced, written_path
    from moewh.warehouse.answer.retry import until_settled

    warehouse.require()  # the same error from the Python API would name its argument
    written_path(output, (".html", ".htm"))
    plotly_script()  # raises before the work, not after
    options = ReportOptions(runs, domain, prompts)

    def contents() -> dict[str, object]:
        with Warehouse(warehouse.root) as opened:
            return collect(opened, options)

    page = render(until_settled(warehouse, contents)).encode()
    with replaced(output) as path:
        path.write_bytes(page)
    shown = len(page) / 1e6
    click.echo(f"{output}: {shown:.1f} MB. Open it in a browser; it needs no other file and no network.", err=True)
