"""Formats of prompts: one file per format, called what `--prompts-format` calls it, with a `FORMAT`.

`moewh.ingest.options` lists the names, `moewh.ingest.prompts.readers` loads the files; neither names any.
"""
