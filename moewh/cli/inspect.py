"""`moewh inspect`: a model in; a description of its MoE layers out, without loading any weights."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import groupby
from typing import TYPE_CHECKING

import click

from moewh.cli.options import readable_option
from moewh.warehouse.remote.published import Readable

if TYPE_CHECKING:
    from moewh.ingest.inspect import Inspection, LayerShape


@click.command(short_help="Describe a model's MoE layers without loading its weights.")
@click.argument("model")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a Hub id; checkpoint of the demo.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Output format."
)
@readable_option
def inspect(
    *,
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    form: str,
    warehouse: Readable,  # noqa: ARG001 - every command takes it
) -> None:
    """Show where MODEL routes tokens to experts, and whether moewh can record it.

    MODEL is a Hub id, a folder, a configuration file, or demo. No weights are loaded.
    """
    from moewh.ingest.model.light_start import start_light

    start_light(other_code=trust_remote_code)
    from moewh.ingest.inspect import inspect_model

    found = inspect_model(model, revision, trust_remote_code)
    if form == "json":
        click.echo(json.dumps(dataclasses.asdict(found), indent=1))
        return
    for name, value in describe(found):
        click.echo(f"{name:<20}{value}".rstrip())


def describe(found: Inspection) -> list[tuple[str, str]]:
    """Return the lines to print, each a name and a value."""
    logits, hidden = found.router_logits_bytes_per_token, found.hidden_states_bytes_per_token
    norm = {True: ", renormalized", False: ", not renormalized", None: ""}[found.renormalized]
    lines = [
        ("model type", f"{found.model_type} ({found.model_class})"),
        *((("adapter", found.peft_adapter),) if found.peft_adapter else ()),
        ("recorded", _status(found)),
        ("layers", f"{found.num_hidden_layers}, of which {found.num_moe_layers} MoE"),
        ("scoring", (found.scoring or "unknown until it runs") + norm if found.layers else "none"),
        ("hidden size", _known(found.hidden_size)),
        ("intermediate size", _known(found.intermediate_size)),
        ("expert size", _known(found.moe_intermediate_size)),
        ("rows per token", f"{found.routing_rows_per_token:,}, about {found.bytes_per_token:,} bytes"),
        ("opt-in, per token", f"router logits {logits:,} bytes, hidden states of all layers {hidden:,}, uncompressed"),
        ("expert outputs", _outputs(found)),
    ]
    for _, alike in groupby(found.layers, _kind):
        lines += [("", ""), *_describe_layers(list(alike))]
    return lines


def _outputs(found: Inspection) -> str:
    size, more = found.expert_outputs_bytes_per_token, found.expert_outputs_arithmetic
    if size is None or more is None:
        return "none to measure"
    return f"{size:,} bytes per token, uncompressed, and about {more:.0%} more arithmetic"


def _status(found: Inspection) -> str:
    if found.status == "refused":
        return f"no: {found.reason}"
    alone = " Prompts are run one by one." if found.one_prompt_a_batch else ""
    return "yes" if found.adapter is None else f"yes, by the adapter {found.adapter}: {found.reason}{alone}"


def _describe_layers(layers: list[LayerShape]) -> list[tuple[str, str]]:
    first = layers[0]
    identity = f", {first.num_identity_experts} of them identity" if first.num_identity_experts else ""
    shared = f"; {first.num_shared_experts} shared" if first.num_shared_experts else ""
    modules = len({layer.module for layer in layers})
    looped = f", visits of {modules} modules: the model loops" if modules < len(layers) else ""
    return [
        (f"{first.stack} layers", _ranges([layer.layer for layer in layers]) + looped),
        ("experts", f"{first.num_experts}{identity}; top-k {first.top_k}{shared}"),
        ("module", f"{_template(first.module)} ({first.module_class})"),
        ("router", "none" if first.router is None else f"{_template(first.router)} ({first.router_class})"),
        *(("router weight", _weight(name, shape)) for name, shape in first.router_weights.items()),
        *(("expert weight", _weight(name, shape)) for name, shape in first.expert_weights.items()),
    ]


def _kind(layer: LayerShape) -> tuple[object, ...]:
    """Return the properties that layers must share to be described together."""
    values = dataclasses.asdict(layer)
    paths = [_template(values.pop(name) or "") for name in ("module", "router")]
    return (*paths, *(str(value) for name, value in values.items() if name != "layer"))


def _template(path: str) -> str:
    return re.sub(r"\.\d+\.", ".{layer}.", f".{path}.", count=1).strip(".")


def _weight(name: str, shape: list[int]) -> str:
    return f"{name} {' x '.join(map(str, shape))}"


def _known(size: int | None) -> str:
    return "not stated" if size is None else str(size)


def _ranges(numbers: list[int]) -> str:
    """Format 0, 1, 2, 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
