"""The run's own files, committed together.

In: a `RunRecord`. Out: run.parquet, layers.parquet, experts.parquet and vocabulary.parquet.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from moewh.ingest.record import RunRecord
from moewh.warehouse import __version__
from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import commit, locked
from moewh.warehouse.files.layout import Layout, deleted
from moewh.warehouse.files.manifest import file_sha256, write_manifest
from moewh.warehouse.files.schema import Table
from moewh.warehouse.files.tables import run_row, write_table


def write_run(layout: Layout, record: RunRecord) -> None:
    """Commit the run's own files (run, layers, experts, vocabulary) with one rename. Losing a race is success.

    Raises MoewhError if writing to disk fails.
    """
    identity = record.identity
    derived = {"identity": identity.sha256, "options": identity.json, "tokens_key": identity.tokens_key}
    begun = {"created_at": datetime.now(UTC).replace(tzinfo=None), "moewh_version": __version__}
    with layout.writing(), layout.staged(f"run.{record.run_id}") as folder:
        write_table(folder, schema.VOCABULARY, _vocabulary(record))
        key = {"vocabulary_key": schema.vocabulary_key(file_sha256(folder / schema.VOCABULARY.file))}
        write_table(folder, schema.RUNS, _columns(schema.RUNS, [{**begun, **derived, **key, **record.run}]))
        write_table(folder, schema.LAYERS, _columns(schema.LAYERS, record.layers))
        write_table(folder, schema.EXPERTS, _columns(schema.EXPERTS, record.experts))
        write_manifest(folder, identity.sha256, None)
        with locked(layout.runs, shared=True):
            if not layout.sealed(record.run_id).is_dir():
                layout.link_unsealed(record.run_id)
            commit(folder, layout.run(record.run_id))


def vocabulary_key(layout: Layout, run_id: str) -> str:
    """Return the key of a run's vocabulary, which its routing rows repeat, from the run's own files.

    Raises MoewhError if another command has deleted them.
    """
    row = run_row(layout.run(run_id), ["vocabulary_key"])
    if row is None:
        raise deleted(run_id)
    return str(row["vocabulary_key"])


def _columns(table: Table, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {column.name: [row.get(column.name) for row in rows] for column in table.stored}


def _vocabulary(record: RunRecord) -> dict[str, Any]:
    texts = pa.array([], pa.string()) if record.vocabulary is None else record.vocabulary
    return {"vocab_id": np.arange(len(texts), dtype=np.int32), "token": texts}
