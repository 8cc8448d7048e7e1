"""The warehouse: table schemas, disk layout, views, answers, and what keeps them right.

Prompts flow through `ingest` into Parquet segments; everything here reads those segments (or names
where they lie). Nothing here knows of torch, of `ingest` or of the command.
"""

__version__ = "0.1.0"
