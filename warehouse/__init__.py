"""The warehouse: table schemas, disk layout, DuckDB views, saved queries and the `moewh` command.

Prompts flow through `ingest` into Parquet segments; everything here reads those segments (or names
where they lie). Torch is never imported from this package except inside the ingest command's body.
"""

__version__ = "0.1.0"
