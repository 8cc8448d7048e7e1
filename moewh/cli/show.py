"""`moewh show`: the token view in a terminal; elsewhere a table of tokens, experts and weights.

In: the result of `moewh.plots.tokens.prompts_data`, whose texts hold no control characters. Out: text, coloured if the
terminal supports it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from moewh.cli.candidates import complete_layers, complete_runs
from moewh.cli.options import readable_option
from moewh.warehouse.remote.published import Readable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_INK = "#000000"
_OTHER = "#dddddd"
_NO_EXPERT = "-"
_RIGHT_TO_LEFT = {"R", "AL", "AN"}


@click.command(short_help="Show a prompt with each token coloured by its expert.")
@click.option("--prompt", "prompt_id", type=int, required=True, metavar="N", help="The prompt's prompt_id.")
@click.option(
    "--layer", type=int, metavar="N", shell_complete=complete_layers, help="The MoE layer.  [default: the first]"
)
@click.option(
    "--run",
    "run_id",
    metavar="RUN",
    shell_complete=complete_runs,
    help="The run.  [default: the newest that has tokens]",
)
@readable_option
def show(prompt_id: int, layer: int | None, run_id: str | None, warehouse: Readable) -> None:
    """Show a prompt with each token coloured by the expert it chose first at a layer.

    The small number after a token is that expert; the legend counts them. Without colours (in a pipe, a file, or with
    NO_COLOR set) the output is a table: each token, its expert with its weight, and the other experts it chose.
    """
    from rich.console import Console

    from moewh.api import Warehouse
    from moewh.plots.tokens import known_layer, newest_run, prompts_data
    from moewh.warehouse.answer.retry import until_settled

    warehouse.require()  # the same error from the Python API would name its argument

    def found() -> tuple[dict[str, Any], int]:
        with Warehouse(warehouse.root) as opened:
            data = prompts_data(opened, newest_run(opened) if run_id is None else run_id, [prompt_id])
        return data, known_layer(data, layer)

    data, chosen = until_settled(warehouse, found)
    prompt = data["prompts"][0]
    route = prompt["routes"][str(chosen)]
    click.echo("\n".join([_title(data, prompt, chosen), *data["notes"], ""]))
    console = Console(highlight=False)
    console.width = console.width or 80  # COLUMNS=0, which some terminals set, would print nothing
    if console.color_system and not console.no_color and route["ranked"]:
        _print_coloured(console, prompt["texts"], route)
    else:
        click.echo("\n".join(_lines(list(_rows(prompt["texts"], route)))))


def _title(data: dict[str, Any], prompt: dict[str, Any], layer: int) -> str:
    domain = "" if prompt["domain"] is None else f" ({isolated(prompt['domain'])})"
    return f"run {data['run']}, prompt {prompt['prompt']}{domain}, layer {layer}"


def isolated(text: str) -> str:
    """Return a text that cannot reorder its surroundings: right-to-left letters between two invisible marks."""
    if any(unicodedata.bidirectional(character) in _RIGHT_TO_LEFT for character in text):
        return f"\u2068{text}\u2069"
    return text


def _print_coloured(console: Console, texts: Sequence[str], route: dict[str, Any]) -> None:
    """Print a prompt's text in colours, and the number of tokens that chose each expert first."""
    from rich.text import Text

    from moewh.plots.tokens import palette

    counts = _counts(route)
    colours = dict(zip((expert for expert, _ in counts), palette(), strict=False))
    shown = Text(no_wrap=False, overflow="fold")
    for text, chosen in zip(texts, route["experts"], strict=True):
        number = str(chosen[0]).translate(_SUBSCRIPTS) if chosen else ""
        style = f"{_INK} on {colours.get(chosen[0], _OTHER)}" if chosen else ""
        shown.append(isolated(text) + number, style)
        shown.append("\n" if text.endswith("⏎") else "")
    console.print(shown)
    console.print()
    for line in _legend(counts, colours):
        console.print(line)


def _counts(route: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the experts that tokens chose first, each with its number of tokens, most used first."""
    counts = Counter(chosen[0] for chosen in route["experts"] if chosen)
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _legend(counts: Sequence[tuple[int, int]], colours: dict[int, str]) -> Iterator[Text]:
    """Yield a line per expert with a colour, and one for all others."""
    from rich.text import Text

    total = sum(tokens for _, tokens in counts)
    lines = [(f"expert {expert}", tokens, colours[expert]) for expert, tokens in counts if expert in colours]
    others = [(expert, tokens) for expert, tokens in counts if expert not in colours]
    if others:
        experts = ", ".join(str(expert) for expert, _ in others)
        lines.append((f"others: {experts}", sum(tokens for _, tokens in others), _OTHER))
    width = max((len(name) for name, _, _ in lines), default=0)
    for name, tokens, colour in lines:
        line = Text(f"{tokens:>6} {'tokens' if tokens != 1 else 'token '} {tokens / total:>5.0%}  ")
        yield line.append(f" {name:{width}} ", f"{_INK} on {colour}")


def _rows(texts: Sequence[str], route: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows, starting with its header: a token and its experts, by rank where known."""
    known = route["weights"] is not None
    yield (
        ("token", *(("expert", "weight") if known else ("expert",)), "runners-up")
        if route["ranked"]
        else (
            "token",
            "experts",
        )
    )
    weights = route["weights"] or [None] * len(texts)
    for text, chosen, weighed in zip(texts, route["experts"], weights, strict=True):
        shown = isolated(text.replace(" ", "␣"))
        if not chosen:
            yield (shown, _NO_EXPERT)
        elif not route["ranked"]:
            yield (shown, " ".join(map(str, chosen)))
        else:
            pairs = list(zip_longest(chosen, weighed or ()))
            others = ", ".join(f"{expert} ({weight})" if known else str(expert) for expert, weight in pairs[1:])
            yield (shown, str(chosen[0]), *((str(pairs[0][1]),) if known else ()), others)


def _lines(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the rows as lines with their columns aligned; a wide character takes two cells."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False))
        yield "  ".join(cells).rstrip(" ")
