"""`moewh ingest`: the options of a run, handed to `ingest.run`, and what a person sees meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from warehouse.layout import Layout
from warehouse.options import warehouse_option
from warehouse.stopping import stoppable

if TYPE_CHECKING:
    from ingest.options import IngestOptions
    from ingest.run import Summary


def _delimiter(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    return "\t" if value in ("\\t", "tab") else value


@click.command(short_help="Run prompts through a model and record its routing.")
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    metavar="ID_OR_PATH",
    help="Hub id, folder (of a model or a peft adapter), or demo. Repeat for more checkpoints, each a run of its own.",
)
@click.option(
    "--prompts",
    multiple=True,
    metavar="FILE",
    help=".jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt (one prompt per line), also .gz, .zst, .bz2 or .xz; a "
    "folder; a quoted pattern; hf://datasets/ORG/NAME[@REVISION]/FILE; - for standard input; demo. Repeat for more.",
)
@click.option(
    "--dataset",
    metavar="NAME",
    help="Read this data set of the Hub (ORG/NAME[@REVISION]) or folder with the `datasets` library.",
)
@click.option("--config", metavar="NAME", help="Configuration of the --dataset.")
@click.option("--split", metavar="NAME", help="Split of the --dataset.  [default: the only one]")
@click.option(
    "--prompts-format",
    type=click.Choice(["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"]),
    help="Instead of the suffix.",
)
@click.option("--delimiter", callback=_delimiter, metavar="CHAR", help="Of CSV.  [default: as the header shows]")
@click.option(
    "--text-column",
    metavar="NAME",
    help="Column of the prompts, a.b if nested.  [default: text, else prompt with completion appended, else "
    "instruction, input and output joined by newlines; or one of messages, conversations, input_ids]",
)
@click.option(
    "--domain-column",
    default="domain",
    show_default=True,
    metavar="NAME",
    help="Column of their domain, a.b if nested.",
)
@click.option("--domain", metavar="NAME", help="The domain of every prompt, instead of a column.")
@click.option(
    "--revision",
    "revisions",
    multiple=True,
    metavar="NAME",
    help="Branch, tag or commit of the hub id; checkpoint of the demo. Repeat for more, each a run of its own.",
)
@click.option(
    "--run-id",
    metavar="ID",
    help="What several checkpoints' ids begin with.  [default: the model's name and a digest of what shapes the rows]",
)
@click.option(
    "--series",
    metavar="NAME",
    help="What checkpoints of one training run share.  [default: the hub id; of folders named after a step, their "
    "parent; of any other folder, the folder alone]",
)
@click.option("--train-step", type=int, metavar="N", help="Of this checkpoint.  [default: as its name says]")
@click.option("--train-tokens", type=int, metavar="N", help="As --train-step.")
@click.option("--max-length", type=int, metavar="N", help="Longest context in tokens.  [default: the model's]")
@click.option(
    "--on-overflow",
    type=click.Choice(["truncate", "chunk", "skip", "error"]),
    default="truncate",
    show_default=True,
    help="What to do with a longer prompt; chunk: consecutive windows, each a context of its own.",
)
@click.option(
    "--tokenizer", metavar="ID_OR_PATH", help="Tokenizer of a model that was saved without one.  [default: the model's]"
)
@click.option("--chat-template", metavar="FILE", help="Jinja file used instead of the tokenizer's chat template.")
@click.option(
    "--chat-argument",
    "chat_arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Passed to the chat template: enable_thinking=false. VALUE is JSON, or else text. Repeat for more.",
)
@click.option("--no-special-tokens", is_flag=True, help="Do not let the tokenizer add its special tokens.")
@click.option("--batch-tokens", type=int, default=8_192, show_default=True, metavar="N", help="Padded tokens a batch.")
@click.option(
    "--segment-rows",
    type=int,
    default=64_000_000,
    show_default=True,
    metavar="N",
    help="Routing rows a segment, about: the unit that is committed and resumed.",
)
@click.option("--limit", type=int, metavar="N", help="Only the first N prompts.")
@click.option(
    "--device", metavar="NAME", help="cuda, cpu, …; auto: spread the model over all GPUs.  [default: the best there is]"
)
@click.option("--dtype", default="auto", metavar="NAME", help="float32, float16 or bfloat16.  [default: as stored]")
@click.option(
    "--generate",
    type=int,
    default=0,
    metavar="N",
    help="Let the model go on for N tokens after each prompt, or to an end token of its generation settings.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    metavar="T",
    help="0: the likeliest token. Nothing else shapes the choice, whatever the model's generation settings say.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the samples, with prompt_id.")
@click.option("--router-logits", is_flag=True, help="Store the routers' raw logits too: 4 E bytes a token and layer.")
@click.option("--hidden-states", metavar="LAYERS", help="Store what these layers' routers are given: 0,5 or all.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model's repository holds.")
@click.option("--allow-pickle", is_flag=True, help="Load pickled weights (pytorch_model.bin), not only safetensors.")
@warehouse_option
def ingest(*, warehouse: Layout, no_special_tokens: bool, **chosen: Any) -> None:
    """Run prompts through a Mixture-of-Experts model and record which expert each token went to.

    Every row is what the experts were called with, in that very forward pass. Killed and run again, the
    same command goes on where it stopped; a finished one writes nothing. Several checkpoints are ingested one
    after another.
    """
    from ingest.options import each_checkpoint

    for options in each_checkpoint(special_tokens=not no_special_tokens, **chosen):
        click.echo(summary_line(run_ingest(options, warehouse)), err=True)


_RESUME_ADVICE = "stopped; what is committed is kept. Run the same command again to go on from there."


def run_ingest(options: IngestOptions, warehouse: Layout) -> Summary:
    """Ingest with progress on stderr: a bar on a terminal, one line per segment elsewhere.

    Raises StoppedError when a signal comes: committed segments stay, and the one being computed is dropped.
    """
    with stoppable(lambda: _RESUME_ADVICE) as check:
        from ingest.processes import this_process
        from ingest.run import Progress
        from ingest.run import ingest as run
        from warehouse.progress import Reporter

        def batch_done(tokens: int) -> None:
            check()
            reporter.batch_done(tokens)

        process = this_process()
        with Reporter(warehouse, process.rank, process.world) as reporter:
            progress = Progress(reporter.started, batch_done, reporter.segment_done, reporter.warn, reporter.note)
            return run(options, warehouse, progress)


def summary_line(summary: Summary) -> str:
    """Say in one line what a command did."""
    if not summary.written:
        return f"run {summary.run_id} is complete already; nothing was written."
    tokens = sum(part.tokens for part in summary.written)
    rows = sum(part.routing_rows for part in summary.written)
    prompts = sum(part.prompts for part in summary.written)
    size = sum(part.bytes for part in summary.written)
    seconds = max(summary.seconds, 1e-9)
    return (
        f"run {summary.run_id}: {prompts:,} prompts, {tokens:,} tokens, {rows:,} routing rows, "
        f"{size / max(tokens, 1):,.0f} bytes a token, {tokens / seconds:,.0f} tokens/s, "
        f"{summary.waiting / seconds:.1%} of the time waiting for the writer, "
        f"{summary.peak_memory / 2**30:.1f} GiB at most"
    )
