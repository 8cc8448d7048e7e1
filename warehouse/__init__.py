"""The warehouse: table schemas, disk layout, views, answers, and what keeps them right.

`ingest` turns prompts into Parquet segments; everything here reads those segments or defines their paths.
Nothing here depends on torch, on `ingest` or on the command line.
"""

__version__ = "0.1.0"
