"""`moewh publish`: send a warehouse's runs to a place where others can read them."""

from __future__ import annotations

import re
import shlex

import click

from moewh.cli.options import warehouse_option
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import DATABASE
from moewh.warehouse.views.sql import sql_string


@click.command(short_help="Send runs to a folder, s3:// or the Hub for others to read.")
@click.argument("target", metavar="TARGET")
@click.option("--run", "runs", metavar="RUN", multiple=True, help="Publish this run. Repeatable.  [default: all]")
@click.option(
    "--without-text/--with-text",
    default=None,
    help="Leave out the text of prompts, and columns that reveal it.  [default: as a run was published before]",
)
@click.option(
    "--url",
    metavar="URL",
    help="Where readers will find a folder, such as https://HOST/wh; '' for its own path.  [default: as before]",
)
@click.option("--license", metavar="ID", help="Licence for the card, such as cc-by-4.0. hf:// needs one.")
@warehouse_option
def publish(
    *,
    target: str,
    runs: tuple[str, ...],
    without_text: bool | None,
    url: str | None,
    license: str | None,
    warehouse: Layout,
) -> None:
    """Send complete runs to TARGET: a folder, s3://BUCKET/FOLDER or hf://datasets/ORG/NAME.

    Runs are sealed and verified first. Only what TARGET lacks is sent, and readers see a run only once it is complete.
    If it is killed, the same command resumes it. Runs published earlier stay.

    --without-text leaves out prompts, tokens and counts by token, and keeps the routing. Routing weights are exact, so
    anyone who has the model can recover a text by trying tokens.
    """
    from moewh.publish.find import target_at
    from moewh.publish.publish import PublishOptions
    from moewh.publish.publish import publish as send

    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise UsageError(f"--license {license!r} is not a licence's id. Write it as the Hub does, such as cc-by-4.0.")
    if license is None and target.startswith("hf://"):
        raise UsageError("a data set on the Hub needs a licence. Add --license ID, such as --license cc-by-4.0.")
    found = target_at(target, url)
    # The Hub's ids are those of SPDX in lower case.
    options = PublishOptions(runs, without_text, license and license.lower())
    done = send(warehouse, found, options, lambda line: click.echo(line, err=True))
    if done.left_out:
        click.echo(f"left out because not complete: {', '.join(done.left_out)}", err=True)
    count = f"{len(done.published)} run{'s'[: len(done.published) != 1]}"
    if not done.changed:
        click.echo(f"Nothing to send: {count} already published at {found.place.root}.")
        return
    click.echo(
        f"Published {count} at {found.place.root} ({done.sent_files:,} files, {done.sent_bytes / 1e6:,.1f} MB sent)."
    )
    click.echo(f"Read: moewh query expert_load --warehouse {shlex.quote(found.place.root)}")
    click.echo(f"      ATTACH {sql_string(f'{found.place.root}/{DATABASE}')} (READ_ONLY);  -- in DuckDB")
