"""`moewh ingest`: pass the options of a run to `moewh.ingest.run`, and show its progress."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import click

from moewh.cli.options import warehouse_option
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.stopping import stoppable

if TYPE_CHECKING:
    from moewh.ingest.options import IngestOptions
    from moewh.ingest.run import Summary


class IngestCommand(click.Command):
    """A command with one option per field of `IngestOptions`, made on first use: `moewh --help` does not need them."""

    _made = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options, in the order of the fields, then the command's own."""
        if not self._made:
            self.params[:0] = ingest_parameters()
            self._made = True
        return super().get_params(ctx)


def ingest_parameters() -> list[click.Option]:
    """Return one click option per field of `IngestOptions`, in their order."""
    from moewh.ingest.options import IngestOptions

    hints = get_type_hints(IngestOptions)
    return [_parameter(one, hints[one.name]) for one in fields(IngestOptions)]


def _parameter(one: Field[Any], hint: Any) -> click.Option:
    """Return the click option of a field, whose type decides what it takes."""
    from moewh.ingest.options import choices_of, option_of

    declared, kind = option_of(one), _without_none(hint)
    shown: dict[str, Any] = {"help": declared.help, "metavar": declared.metavar}
    if declared.repeats_run:
        return click.Option([declared.flag, f"{one.name}s"], multiple=True, required=one.default is MISSING, **shown)
    words = [declared.flag, one.name]
    if kind is bool:
        flip = (lambda _context, _parameter, given: not given) if one.default else None
        return click.Option(words, is_flag=True, callback=flip, help=declared.help)
    if get_origin(kind) is tuple:
        return click.Option(words, multiple=True, **shown)
    read = declared.read
    choices = choices_of(kind, declared)
    return click.Option(
        words,
        type=click.Choice(choices) if choices else kind,
        default=one.default,
        show_default=declared.show_default,
        callback=None if read is None else lambda _context, _parameter, word: None if word is None else read(word),
        **shown,
    )


def _without_none(hint: Any) -> Any:
    """Return X for X | None."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(part for part in get_args(hint) if part is not NoneType)


@click.command(cls=IngestCommand, short_help="Run prompts through a model and record its routing.")
@warehouse_option
def ingest(*, warehouse: Layout, **chosen: Any) -> None:
    """Run prompts through a Mixture-of-Experts model and record which expert each token went to.

    Every row is exactly what the experts were called with in that forward pass. Killed and run again, the
    same command continues where it stopped; a finished one writes nothing. Several checkpoints are ingested
    one after another.
    """
    from moewh.ingest.options import each_checkpoint

    for options in each_checkpoint(**chosen):
        click.echo(summary_line(run_ingest(options, warehouse)), err=True)


RESUME_ADVICE = "stopped; committed segments are kept. Run the same command again to continue."


def run_ingest(options: IngestOptions, warehouse: Layout) -> Summary:
    """Ingest with progress on stderr: a bar on a terminal, one line per segment elsewhere.

    Raises StoppedError when a signal comes: committed segments stay, and the one being computed is dropped.
    """
    with stoppable(lambda: RESUME_ADVICE) as check:
        from moewh.ingest.model.light_start import start_light

        start_light(other_code=options.trust_remote_code)
        from moewh.cli.progress import Reporter
        from moewh.ingest.processes import this_process

        def batch_done(tokens: int) -> None:
            check()
            reporter.batch_done(tokens)

        process = this_process()
        with Reporter(process.rank, process.world) as reporter:
            from moewh.ingest.run import Progress  # takes seconds, for torch and transformers
            from moewh.ingest.run import ingest as run

            progress = Progress(reporter.started, batch_done, reporter.segment_done, reporter.warn, reporter.note)
            return run(options, warehouse, progress, process)


def summary_line(summary: Summary) -> str:
    """Return one line that reports what a command did."""
    if not summary.written:
        return f"run {summary.run_id} is complete already; nothing was written."
    tokens = sum(part.tokens for part in summary.written)
    rows = sum(part.routing_rows for part in summary.written)
    prompts = sum(part.prompts for part in summary.written)
    size = sum(part.bytes for part in summary.written)
    seconds = max(summary.seconds, 1e-9)
    counted = ", ".join(f"{number:,} {status}" for status, number in sorted(summary.not_whole.items()))
    return (
        f"run {summary.run_id}: {prompts:,} prompt{'s'[: prompts != 1]}{f' ({counted})' if counted else ''}, "
        f"{tokens:,} tokens, {rows:,} routing rows, "
        f"{size / max(tokens, 1):,.0f} bytes per token, {tokens / seconds:,.0f} tokens/s, "
        f"{summary.waiting / seconds:.1%} of the time waiting for the writer, "
        f"{summary.peak_memory / 2**30:.1f} GiB at most"
    )
