"""`moewh geometry`: pass the options to `moewh.ingest.geometry.run`; show progress and a closing line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from moewh.cli.candidates import complete_runs
from moewh.cli.options import warehouse_option
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import check_run_id

if TYPE_CHECKING:
    from moewh.ingest.geometry.run import Measured


@click.command(short_help="Measure the router and expert weights of a run's model.")
@click.option("--model", required=True, metavar="ID_OR_PATH", help="The run's own model: Hub id, folder or demo.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a Hub id; checkpoint of the demo.")
@click.option(
    "--run",
    "--run-id",
    "run_id",
    metavar="ID",
    shell_complete=complete_runs,
    help="The run to measure.  [default: the only run of this model]",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="R",
    help="Dimension of the subspaces compared.  [default: a 16th of the hidden size, at most 16]",
)
@click.option("--device", metavar="NAME", help="Where to compute: cuda, cpu, …  [default: the best available]")
@click.option("--overwrite", is_flag=True, help="Replace a geometry of another rank.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
@warehouse_option
def geometry(*, warehouse: Layout, run_id: str | None, **chosen: Any) -> None:
    """Measure a model's router and expert weights, and store the result beside a run of the model.

    For each expert: norms, effective ranks, kurtosis, and how much of its router row lies in its input and output
    subspaces. For each pair of experts: how similar they are. The tables are expert_geometry, router_similarity and
    expert_similarity. One layer of the safetensors files is in memory at a time.
    `moewh query geometry_predicts_co_routing` compares the result with the routing.
    """
    from moewh.ingest.model.light_start import start_light

    start_light(other_code=chosen["trust_remote_code"])
    from moewh.ingest.geometry.run import GeometryOptions, measure
    from moewh.warehouse.views.publishing import publish

    options = GeometryOptions(run_id=run_id and check_run_id(run_id), **chosen)
    with _progress() as layer_done:
        measured = measure(options, warehouse, layer_done)
    if measured.layers:
        publish(warehouse)
    click.echo(summary_line(measured), err=True)


def summary_line(measured: Measured) -> str:
    """Return one line that reports what the command did."""
    if not measured.layers:
        return f"the geometry of run {measured.run_id} is complete already; nothing was written."
    return (
        f"geometry of run {measured.run_id}: {measured.layers:,} layers, {measured.experts:,} experts, "
        f"{measured.pairs:,} pairs, subspaces of rank {measured.rank}"
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show the layers done as a bar on a terminal, on stderr; elsewhere the summary is enough."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("layers", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
