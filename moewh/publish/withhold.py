"""Copy a run without the text of its prompts, for `moewh publish --without-text`.

Left out are the text, source and metadata of prompts; the vocabulary entry of each token, in every table, because
entries reveal the text; counts by entry; and hidden states, from which entries can be recovered. The numbers of prompts
and tokens, their domains, positions and kinds, and all routing remain. So does the tokenizer's vocabulary, which is the
same for every text.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moewh.publish.pieces import Piece, piece_of
from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import add_mark
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import read_manifest, write_manifest
from moewh.warehouse.files.tables import parquet_options, write_chunks
from moewh.warehouse.sealing.merge import write_sealed

WITHHELD: dict[str, tuple[str, ...]] = {
    schema.PROMPTS.name: ("text", "source", "metadata"),
    schema.TOKENS.name: ("vocab_id", "token"),
    schema.ROUTING.name: ("vocab_id",),
}
"""Columns that become NULL, by table."""
EMPTY = frozenset({schema.AFFINITY_COUNTS.name, schema.VOCAB_COUNTS.name})
"""Tables that become empty, as counts by entry are for tokens with unknown entries."""
ABSENT = frozenset({schema.HIDDEN_STATES.name})
"""Opt-in tables that are not published."""


def without_text(layout: Layout, run_id: str, pieces: list[Piece], folder: Path) -> list[Piece]:
    """Rewrite the folders of a run that hold text below `folder`; return the pieces to publish instead."""
    copy = Layout(folder)
    segments = []
    for piece in pieces:
        if piece.path.startswith("segments/"):
            _write_segment(piece.folder, folder / piece.path)
            segments.append(folder / piece.path)
    sealed = copy.sealed(run_id)
    sealed.mkdir(parents=True)
    write_sealed(layout.run(run_id), segments, sealed)
    write_manifest(sealed, read_manifest(layout.sealed(run_id)).identity, None)
    add_mark(sealed)
    return [piece_of(copy, folder / piece.path) if (folder / piece.path).is_dir() else piece for piece in pieces]


def _write_segment(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for table in schema.TABLES:
        file = source / table.file
        if table.level != "segment" or table.name in ABSENT or not file.is_file():
            continue
        if table.name in EMPTY:
            write_chunks(target / table.file, table, [])
        elif table.name in WITHHELD:
            _write_nulls(file, target / table.file, table, WITHHELD[table.name])
        else:
            (target / table.file).symlink_to(file.resolve())
    manifest = read_manifest(source)
    write_manifest(target, manifest.identity, manifest.segment)


def _write_nulls(source: Path, target: Path, table: schema.Table, columns: tuple[str, ...]) -> None:
    """Copy a file, row group by row group, with some columns set to NULL."""
    with (
        pq.ParquetFile(source) as file,
        pq.ParquetWriter(target, file.schema_arrow, **parquet_options(table)) as writer,
    ):
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group)
            for name in columns:
                index = rows.schema.get_field_index(name)
                field = rows.schema.field(index)
                rows = rows.set_column(index, field, pa.nulls(len(rows), field.type))
            writer.write_table(rows, row_group_size=max(len(rows), 1))
