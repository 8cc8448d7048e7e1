"""Prompt formats: one module per format, named as in `--prompts-format`, which defines `FORMAT`.

`moewh.ingest.options` lists the modules and `moewh.ingest.prompts.readers` loads them; neither mentions any by name.
"""
