"""A run's geometry: measure its model's weights layer by layer, and commit the three tables together.

In: a model, and a run of it in the warehouse. Out: the folder `geometry/run_id=<run>/`. The model must be the run's
own, which is checked by its recorded identity: weights that did not route the run would explain nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from moewh.ingest.families.rule import MoELayer
from moewh.ingest.geometry.checkpoint import NO_SAFETENSORS, Checkpoint
from moewh.ingest.geometry.matrices import layer_weights
from moewh.ingest.geometry.subspaces import Columns, LayerGeometry, layer_geometry
from moewh.ingest.model.architecture import check_location, check_versions, read_config
from moewh.ingest.model.layers import refuse_by_name
from moewh.ingest.model.loading import (
    Source,
    choose_device,
    commit_of,
    config_sha256,
    explaining,
    find_source,
    silence_libraries,
    weights_fingerprint,
)
from moewh.ingest.model.peft_adapter import adapter_settings_file
from moewh.ingest.model.repository import Repository
from moewh.ingest.processes import Process
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import move_away
from moewh.warehouse.files.folders import own_entries
from moewh.warehouse.files.layout import Layout, deleted
from moewh.warehouse.files.manifest import write_manifest
from moewh.warehouse.files.tables import parquet_options, read_rows, run_row
from moewh.warehouse.runs import check_known, run_ids
from moewh.warehouse.trust.repair import geometry_rank

_LARGEST_DEFAULT = 16
_DEFAULT_PART = 16
"""The default rank is a 16th of the hidden size, at most 16."""


@dataclass(frozen=True)
class GeometryOptions:
    """The options of `moewh geometry`."""

    model: str
    revision: str | None = None
    run_id: str | None = None
    """None: the only run of this model."""
    rank: int | None = None
    """r; None: chosen by the hidden size."""
    device: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Measured:
    """What a command did, for its closing line."""

    run_id: str
    rank: int
    layers: int = 0
    """0 if the geometry existed already."""
    experts: int = 0
    pairs: int = 0


def measure(
    options: GeometryOptions, layout: Layout, layer_done: Callable[[int, int], None] = lambda *_: None
) -> Measured:
    """Measure the weights of a run's model and commit the results; `layer_done` is called with (done, total).

    Raises UsageError or MoewhError; nothing half-written is left.
    """
    layout.require().require_one_disk()
    check_versions()
    silence_libraries()
    device = _device(options.device)
    check_location(options.model, options.revision)
    source = find_source(options.model, options.revision)
    config, commit_hash = _read(source, options.trust_remote_code)
    run = _find_run(layout, options, _identity(source, config, commit_hash))
    checkpoint = Checkpoint(source, config, commit_hash or source.revision, options.trust_remote_code)
    moe_layers = _recorded(layout, run, checkpoint.moe_layers)
    rank = _rank(options.rank, moe_layers)
    if layout.geometry(run["run_id"]).is_dir() and not options.overwrite:
        _require_same(layout, run["run_id"], rank)
        return Measured(run["run_id"], rank)
    layers = _measured_layers(checkpoint, moe_layers, rank, device, layer_done)
    experts, pairs = _write(layout, run, layers)
    return Measured(run["run_id"], rank, len(moe_layers), experts, pairs)


def _measured_layers(
    checkpoint: Checkpoint,
    moe_layers: list[MoELayer],
    rank: int,
    device: torch.device,
    layer_done: Callable[[int, int], None],
) -> Iterator[LayerGeometry]:
    """Yield each layer's geometry, after freeing its weights."""
    for done, moe in enumerate(moe_layers, 1):
        with checkpoint.layer(moe):
            found = layer_geometry(layer_weights(moe), moe.layer, moe.num_experts, rank, device)
        yield found
        layer_done(done, len(moe_layers))


def _write(layout: Layout, run: dict[str, Any], layers: Iterable[LayerGeometry]) -> tuple[int, int]:
    """Write every layer's rows and commit them with one rename; return the numbers of experts and of pairs.

    An existing geometry is removed first: a run killed between the two renames has none, and is measured again.
    """
    layout.create()
    experts = pairs = 0
    target = layout.geometry(run["run_id"])
    with layout.writing(), layout.staged(f"geometry.{run['run_id']}") as folder:
        (new := folder / "new").mkdir()
        with _writers(new) as write:
            for found in layers:
                write(found.experts, found.router_pairs, found.expert_pairs)
                experts += len(found.experts["layer"])
                pairs += len(found.expert_pairs["layer"])
        write_manifest(new, run["identity"], None)
        move_away(target, folder / "old")
        layout.commit_of_run(run["run_id"], new, target)
    return experts, pairs


@contextmanager
def _writers(folder: Path) -> Iterator[Callable[[Columns, Columns, Columns], None]]:
    """Yield a function that appends a layer's rows to the three tables; NaN becomes NULL."""
    tables = (schema.EXPERT_GEOMETRY, schema.ROUTER_SIMILARITY, schema.EXPERT_SIMILARITY)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pq.ParquetWriter(folder / table.file, table.arrow(), **parquet_options(table)))
            for table in tables
        ]

        def write(*found: Columns) -> None:
            for table, writer, columns in zip(tables, writers, found, strict=True):
                arrays = [pa.array(columns[column.name], from_pandas=True) for column in table.stored]
                writer.write_table(pa.table(arrays, schema=table.arrow()))

        yield write


# ------------------------------------------------------------------------------------------ the model and its run


def _device(name: str | None) -> torch.device:
    """Return the device to compute on; Apple's GPUs do not support float64."""
    device = choose_device(name, Process())
    if device is None:
        raise UsageError("--device auto spreads a whole model; a geometry takes one layer at a time. Name one device.")
    return torch.device("cpu") if device.type == "mps" else device


def _read(source: Source, trust_remote_code: bool) -> tuple[Any, str | None]:
    """Return the model's configuration, and the commit of a hub model. Raises MoewhError."""
    with explaining(source.title):
        commit_hash = commit_of(source)
        if adapter_settings_file(Repository(source.location, commit_hash or source.revision)) is not None:
            raise MoewhError(
                f"{source.title} is an adapter: its weights are changes to its base's, which a geometry does not "
                "measure. Merge it into its base (peft's merge_and_unload), record that model, and measure it."
            )
        arguments = {"revision": commit_hash or source.revision, "trust_remote_code": trust_remote_code}
        config = read_config(source.location, **arguments)
    refuse_by_name(config)
    return config, commit_hash


def _identity(source: Source, config: Any, commit_hash: str | None) -> dict[str, Any]:
    """Return what a run of this model records about it: digests of a folder's files, or a hub id and its commit.

    Raises MoewhError for a folder without safetensors.
    """
    if source.revision is not None:
        revision = commit_hash or source.checkpoint
        return {"model": source.title, "revision": revision, "weights_sha256": None}
    folder = Path(source.location)
    if not own_entries(folder, "*.safetensors"):
        raise MoewhError(NO_SAFETENSORS.format(title=source.title))
    identity = {"weights_sha256": weights_fingerprint(folder)}
    if getattr(config, "quantization_config", None) is None:  # loading changes this part of a configuration
        identity["config_sha256"] = config_sha256(config)
    return identity


def _find_run(layout: Layout, options: GeometryOptions, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the run that the geometry belongs to. Raises MoewhError, or UsageError if several fit."""
    if options.run_id is not None:
        check_known(layout, options.run_id)
        run = _run_row(layout, options.run_id)
        if differing := _differences(run, identity):
            raise MoewhError(
                f"run {options.run_id!r} is not of the model {options.model}: {'; '.join(differing)}. "
                "Give the model that it was recorded from, or another --run-id."
            )
        return run
    fitting = [run for run_id in run_ids(layout) if not _differences(run := _run_row(layout, run_id), identity)]
    if not fitting:
        raise MoewhError(
            f"no run in {layout.root} is of the model {options.model} as it is now. Record one with "
            "`moewh ingest`, or name another --model or --revision."
        )
    if len(fitting) > 1:
        names = ", ".join(run["run_id"] for run in fitting)
        raise UsageError(f"{len(fitting)} runs are of this model: {names}. Choose one with --run-id.")
    return fitting[0]


def _run_row(layout: Layout, run_id: str) -> dict[str, Any]:
    try:
        row = run_row(layout.run(run_id))
    except (OSError, pa.ArrowException) as error:
        raise MoewhError(f"run {run_id} cannot be read: {error}. See `moewh verify`.") from error
    if row is None:
        raise deleted(run_id)
    return {"run_id": run_id, **row}


def _differences(run: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Describe how a run's recorded model differs from this one."""
    recorded = json.loads(run["options"] or "{}")
    return [
        f"{name} was {recorded.get(name)}, is {value}"
        for name, value in identity.items()
        if recorded.get(name) != value
    ]


def _recorded(layout: Layout, run: dict[str, Any], moe_layers: list[MoELayer]) -> list[MoELayer]:
    """Return the layers that the run has: for an encoder-decoder that generated nothing, the encoder's."""
    path = layout.run(run["run_id"]) / schema.LAYERS.file
    layers = set(read_rows(path, ["layer"]).column("layer").to_pylist())
    return [moe for moe in moe_layers if moe.layer in layers]


def _rank(asked: int | None, moe_layers: list[MoELayer]) -> int:
    """Return r, which every layer's matrices must allow. Raises UsageError, or MoewhError for an unknown layout."""
    layers = [layer_weights(moe) for moe in moe_layers]
    most = min(weights.largest_rank for weights in layers)
    hidden = min(weights.hidden_size for weights in layers)
    rank = asked or max(1, min(_LARGEST_DEFAULT, hidden // _DEFAULT_PART, most))
    if rank > most:
        raise UsageError(f"--rank {rank} is more than the experts' matrices have: give at most {most}.")
    return rank


def _require_same(layout: Layout, run_id: str, rank: int) -> None:
    """Raise MoewhError unless the existing geometry has this rank."""
    stored = geometry_rank(layout, run_id)
    if stored != rank:
        was = "cannot be read (see `moewh verify`)" if stored is None else f"has rank {stored}, not {rank}"
        raise MoewhError(f"the geometry of run {run_id} {was}. Add --overwrite to replace it.")
